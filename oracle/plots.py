"""Figures for pages and notebooks, by matplotlib: the staircase of errors, histograms, and the map of a difference."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxref.stages import Key
from oracle.page.palette import LIGHT, themed
from oracle.page.sheet import Series
from oracle.trees import ordered, path_of
from weights import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from oracle.page.differences import Differences

WIDE, NARROW = (10.0, 3.6), (4.4, 3.6)  # inches
CROWDED = 150  # stages from which crosses are small and points have no dots
SHADES = 24  # of a map: few enough that its PNG stays small
DEPTH = 1e-6  # of a map's darkest shade, from the brightest
_KINDS: dict[str, dict[str, Any]] = {
    "test": {"color": LIGHT["test"], "linewidth": 1.5, "marker": ".", "markersize": 3, "zorder": 4},
    "hf": {"color": LIGHT["hf"], "linewidth": 1.3, "linestyle": (0, (6, 2)), "zorder": 5},
    "limit": {"color": LIGHT["limit"], "linewidth": 1.0, "linestyle": (0, (3, 2)), "zorder": 2},
    "floor": {"color": LIGHT["muted"], "linewidth": 1.0, "linestyle": (0, (1, 2)), "zorder": 1},
}
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxref",
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["ink"],
    "ytick.color": LIGHT["ink"],
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def need_matplotlib() -> None:
    """Raise `UserError` where the library that draws is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed: pip install 'jaxref[html]'") from None


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: a figure that nobody has to close

    figure = Figure(figsize=size)
    return figure, figure.add_subplot()


def staircase(lines: Sequence[Series], size: tuple[float, float] = WIDE) -> Figure:
    """Relative L2 over all stages in computation order, on a logarithmic axis; equal tensors lie on its lower edge."""
    import matplotlib

    keys = ordered({key for line in lines for key in line.points})
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(size)
        low, high = _range(lines)
        for line in lines:
            values = np.array([line.points.get(key, math.nan) for key in keys], float)
            values = np.where(np.isnan(values), np.nan, np.clip(values, low, high))
            style = _KINDS[line.kind] | ({"marker": ""} if len(keys) >= CROWDED else {})
            axes.semilogy(range(len(keys)), values, label=line.name, drawstyle="steps-mid", **style)
            crossed = [place for place, key in enumerate(keys) if key in line.marked]
            cross = {"color": LIGHT["ink"], "markersize": 5 if len(keys) < CROWDED else 3, "zorder": 6}
            axes.plot(crossed, values[crossed], "x", **cross)
        axes.set(ylim=(low, high), ylabel="relative L2", xlim=(-1, len(keys)))
        _layer_ticks(axes, keys, most=28 if size[0] > 6 else 10)
        _first_cross(axes, keys, lines)
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=4 if size[0] > 6 else 2, fontsize=9)
    return figure


def _range(lines: Sequence[Series]) -> tuple[float, float]:
    """Powers of ten around all values, with room below for what is equal."""
    values = [value for line in lines for value in line.points.values() if 0 < value < math.inf]
    if not values:
        return 1e-9, 1.0
    return 10.0 ** (math.floor(math.log10(min(values))) - 1), 10.0 ** math.ceil(math.log10(max(values) * 1.5))


def _layer_ticks(axes: Axes, keys: Sequence[Key], most: int) -> None:
    """A tick where a layer begins, named where there is room."""
    first: dict[int | None, int] = {}
    for place, (layer, _) in enumerate(keys):
        first.setdefault(layer, place)
    layers = [layer for layer in first if layer is not None]
    step = max(1, -(-len(layers) // most))
    for layer in layers:
        axes.axvline(first[layer] - 0.5, color=LIGHT["line"], linewidth=0.5, zorder=0)
    named = [layer for layer in layers if layer % step == 0]
    axes.set_xticks([first[layer] - 0.5 for layer in named], [str(layer) for layer in named])
    axes.set_xlabel("layer (its stages in computation order)")


def _first_cross(axes: Axes, keys: Sequence[Key], lines: Sequence[Series]) -> None:
    """The first crossed stage by its name."""
    marked = frozenset().union(*(line.marked for line in lines))
    place = next((place for place, key in enumerate(keys) if key in marked), None)
    if place is None:
        return
    axes.axvline(place, color=LIGHT["ink"], linewidth=0.8, zorder=0)
    right = place < len(keys) / 2
    spot = {"xytext": (4 if right else -4, -2), "textcoords": "offset points", "va": "top"}
    axes.annotate(
        path_of(keys[place]), (place, 1), xycoords=("data", "axes fraction"), ha="left" if right else "right", **spot
    )


def difference_map(found: Differences, brightest: float) -> Figure:
    """The difference by row and column in shades from `brightest` down, on a logarithmic scale."""
    import matplotlib
    from matplotlib.colors import LogNorm

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((4.4, 3.2))
        colours = matplotlib.colormaps["cividis"].resampled(SHADES).with_extremes(bad="#ffffff")
        low = brightest * DEPTH
        rows = len(found.row_labels)
        image = axes.imshow(
            np.clip(found.cells, low, None),
            norm=LogNorm(low, brightest),
            cmap=colours,
            aspect="auto",
            interpolation="none",
            extent=(0, found.column_count, rows, 0),
        )
        _row_ticks(axes, found)
        _head_ticks(axes, found)
        axes.set(ylabel=found.row_name)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
        bar.ax.minorticks_off()
        bar.set_label("|difference| / rms")
    return figure


def _row_ticks(axes: Axes, found: Differences) -> None:
    places = range(0, len(found.row_labels), max(1, -(-len(found.row_labels) // 8)))
    axes.set_yticks([place + 0.5 for place in places], [str(found.row_labels[place]) for place in places])


def _head_ticks(axes: Axes, found: Differences) -> None:
    """Where heads lie side by side, the columns are named by them."""
    axes.set_xlabel(found.column_name)
    if not found.heads:
        axes.locator_params(axis="x", nbins=6, integer=True)
        return
    width, step = found.column_count / len(found.heads), max(1, -(-len(found.heads) // 12))
    for head in range(1, len(found.heads)):
        axes.axvline(head * width, color="#ffffff", linewidth=0.4)
    places = range(0, len(found.heads), step)
    axes.set_xticks([(head + 0.5) * width for head in places], [found.heads[head] for head in places])
    axes.set_xlabel(f"head ({width:.0f} channels each)")


def histogram_of_values(found: Mapping[str, Differences]) -> Figure:
    """How often each value occurs, for every side; counts on a logarithmic axis."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((4.4, 3.0))
        reach = max(one.reach for one in found.values())
        for role, one in found.items():
            edges = np.linspace(-one.reach, one.reach, one.values.shape[1] + 1)
            if role == next(iter(found)):
                axes.stairs(one.values[0], edges, fill=True, color=LIGHT["line"], label="reference")
            style = _KINDS[role]
            axes.stairs(one.values[1], edges, color=style["color"], linestyle=style.get("linestyle", "-"), label=role)
        axes.set(yscale="log", xlabel="value / rms of the reference", ylabel="values", xlim=(-reach, reach))
        axes.set_ylim(bottom=0.5)
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def histogram_of_differences(found: Mapping[str, Differences], decades: tuple[float, float]) -> Figure:
    """How often a difference of each magnitude occurs, for every side but the reference."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure((4.4, 3.0))
        for role, one in found.items():
            edges = 10.0 ** np.linspace(*decades, len(one.errors) + 1)
            style = _KINDS[role]
            words = f"{role} ({one.equal / one.count:.0%} equal)" if one.count and one.equal else role
            axes.stairs(one.errors, edges, color=style["color"], linestyle=style.get("linestyle", "-"), label=words)
        axes.set(xscale="log", xlabel="|difference| / rms of the reference", ylabel="values")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def svg_of(figure: Figure, name: str) -> str:
    """A figure as SVG to stand in a page: in the page's colours, with ids of its own."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # hundredths of a point are enough
    return themed(re.sub(r"\n\s*", "\n", svg))
