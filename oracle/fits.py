"""Parameters of hypotheses read off the engine's own output, in closed form, and made round where that fits as well."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jaxref.rope import inverse_frequencies
from oracle.bench import Bench
from oracle.deviations import visible
from weights.config import RopeScaling

STRETCHES = (2.0, 4.0, 8.0, 16.0, 32.0)
THETAS = (1e4, 1e6, 5e5, 1e7, 1e5)
EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-2, 0.0)


def rounded(value: float, digits: int = 3) -> float:
    """With few digits, as people choose numbers."""
    return float(f"{value:.{digits - 1}e}")


def frequencies(bench: Bench, scaling: RopeScaling | None) -> np.ndarray:
    """[h/2] of this model with or without its scaling."""
    return inverse_frequencies(bench.config.head_dim, bench.settings["theta"], scaling)


def _angles(bench: Bench) -> tuple[int, np.ndarray] | None:
    """A position from 1 on, the smallest that is there, and the angles [h/2] that its pairs were turned by."""
    later = [(p, i) for i, p in enumerate(bench.case.positions) if p > 0]
    if not later:
        return None
    position, row = min(later)
    s, h = bench.settings, bench.config.head_dim
    x = bench.x[0][row, s["start"] : s["start"] + s["heads"] * h].reshape(-1, 2, h // 2)
    y = bench.engine[row].reshape(-1, 2, h // 2)
    # Least squares over heads: y = turn·x, pairs taken as complex numbers.
    a, b = x[:, 0] + 1j * x[:, 1], y[:, 0] + 1j * y[:, 1]
    return position, np.angle((b * a.conj()).sum(axis=0))


def thetas(bench: Bench) -> Iterator[float]:
    """Bases that people use, and the one whose frequencies fit the angles at the first position."""
    stated = bench.settings["theta"]
    yield from (theta for theta in THETAS if theta != stated)
    found = _angles(bench)
    if found is None or bench.settings["scaling"] is not None:
        return
    position, angles = found
    pairs, h = np.arange(len(angles)), bench.config.head_dim
    # Small angles hold few digits in half precision, large ones may have gone round; the weights favour the middle.
    keep = (angles > 1e-3) & (pairs > 0)
    if position > 1 or keep.sum() < 2:
        return
    exponent = -np.log(angles[keep]) * h / (2 * pairs[keep])
    weight = np.square(pairs[keep] * np.minimum(angles[keep], 1.0))
    theta = math.exp(float((exponent * weight).sum() / weight.sum()))
    for value in dict.fromkeys((rounded(theta, 2), rounded(theta, 3), theta)):
        if abs(value - stated) > 1e-3 * stated:
            yield value


def stretches(bench: Bench) -> Iterator[float]:
    """Factors that people use, and the one between all angles and those that should be, where two positions show it.

    At one position alone, a decode step's, any number added to it is a factor too.
    """
    yield from STRETCHES
    found = _angles(bench) if bench.shown and sum(p > 0 for p in bench.case.positions) > 1 else None
    if found is None:
        return
    position, angles = found
    wanted = position * frequencies(bench, bench.settings["scaling"])
    keep = (wanted < 3.0) & (np.abs(angles) > 1e-4)
    if not keep.any():
        return
    factor = float(np.median(wanted[keep] / angles[keep]))
    for value in dict.fromkeys((rounded(factor, 2), factor)):
        if (
            value > 0 and value not in STRETCHES and min(abs(value - 1), abs(value - 0.5)) > 1e-3
        ):  # a half is RoPE applied twice
            yield value


def offsets(bench: Bench) -> np.ndarray | None:
    """By how much each row's position is off [S], where whole numbers say it; None where no row tells.

    The slowest pair tells a position roughly and has not gone round; each faster one tells it better.
    """
    s, h = bench.settings, bench.config.head_dim
    x = bench.x[0][:, s["start"] : s["start"] + s["heads"] * h].reshape(len(bench.engine), -1, 2, h // 2)
    y = bench.engine.reshape(x.shape)
    turns = ((y[:, :, 0] + 1j * y[:, :, 1]) * (x[:, :, 0] - 1j * x[:, :, 1])).sum(axis=1)
    position = np.zeros(len(x))
    for angle, frequency in zip(np.angle(turns).T[::-1], frequencies(bench, s["scaling"])[::-1], strict=True):
        rounds = np.round((position * frequency - angle) / (2 * math.pi))
        position = (angle + 2 * math.pi * rounds) / frequency
    if not np.isfinite(position).all() or np.abs(position - np.round(position)).max() > 0.1:
        return None
    found = np.round(position).astype(int) - np.asarray(bench.case.positions)
    return found if found.any() else None


def epsilons(bench: Bench) -> Iterator[float]:
    """Those that people use, and the one that the sizes of the rows ask for."""
    stated = bench.settings["eps"]
    yield from (eps for eps in EPSILONS if eps != stated)
    if bench.stage in ("q_norm", "k_norm"):
        return
    x, y = bench.x[0], bench.engine
    unit = x * np.asarray(getattr(bench.case.params, bench.row.params[0]))
    size = np.square(x).mean(axis=1)
    with np.errstate(all="ignore"):
        scale = (y * unit).sum(axis=1) / np.square(unit).sum(axis=1)
        eps = float(np.median(1 / np.square(scale) - size))
    if math.isfinite(eps) and eps > 0:
        yield from (value for value in (rounded(eps, 1), rounded(eps, 2)) if value not in EPSILONS and value != stated)


def windows(bench: Bench) -> Iterator[int]:
    """How many keys the last query gives any weight to; where that is not shown, any few, and powers of two."""
    if not bench.shown:
        last = bench.case.positions[-1]
        yield from (
            w for w in (*range(1, 16), *(2**n for n in range(4, 17))) if w <= last and w != bench.settings["window"]
        )
        return
    seen: np.ndarray = np.abs(bench.engine[:, -1, :]).max(axis=0) > 0
    last = bench.case.positions[-1]
    window = last + 1 - int(seen[: last + 1].argmax()) if seen.any() else 0
    if 0 < window <= last and window != bench.settings["window"]:
        yield window


def factors(bench: Bench) -> Iterator[float]:
    """The scale between the engine's output and the right one; square roots of the width are taken as such."""
    exact = bench.run({})
    if exact.shape != bench.engine.shape:
        return
    exact = np.where(visible(bench.stage, exact, bench.case.positions), exact, 0.0)
    with np.errstate(all="ignore"):
        factor = float((exact * bench.engine).sum() / np.square(exact).sum())
    if not math.isfinite(factor) or factor == 0 or abs(factor - 1) < 1e-4:
        return
    root = math.sqrt(bench.config.hidden_size)
    nice = [root, 1 / root, 2.0, 0.5, rounded(factor, 2), rounded(factor, 3)]
    yield from dict.fromkeys(value for value in nice if abs(value / factor - 1) < 1e-2)
    yield factor


def part_factors(bench: Bench) -> Iterator[tuple[str, float]]:
    """The scale of q, of k and of v alone."""
    exact, start = bench.run({}), 0
    if exact.shape != bench.engine.shape:
        return
    root = math.sqrt(bench.config.head_dim)
    for part, width in zip("qkv", (bench.config.q_width, bench.config.kv_width, bench.config.kv_width), strict=True):
        ours, theirs = exact[:, start : start + width], bench.engine[:, start : start + width]
        start += width
        with np.errstate(all="ignore"):
            factor = float((ours * theirs).sum() / np.square(ours).sum())
        if math.isfinite(factor) and factor != 0 and abs(factor - 1) > 1e-3:
            nice = [1 / root, root, 2.0, 0.5, rounded(factor, 2), rounded(factor, 3)]
            found = next((value for value in nice if abs(value / factor - 1) < 1e-3), factor)
            yield part, found


def common_offset(bench: Bench) -> np.ndarray | None:
    """What is added at every token alike, from three tokens on; the first half tells it, all must fit."""
    difference = bench.engine - bench.run({})
    if len(difference) < 3:
        return None
    plus = difference[: max(1, len(difference) // 2)].mean(axis=0)
    # A bias fills the row; what strikes a few channels is something else.
    return plus if np.mean(np.abs(plus) > 1e-2 * np.abs(plus).max()) > 0.5 else None


def head_orders(bench: Bench) -> Iterator[tuple[str, np.ndarray]]:
    """For q, k and v the order of heads in which the right product fits, where it is a permutation."""
    exact, h, start = bench.run({}), bench.config.head_dim, 0
    widths = {"q_proj": bench.config.num_attention_heads, "k_proj": bench.config.num_key_value_heads}
    widths["v_proj"] = bench.config.num_key_value_heads
    for field, heads in widths.items():
        ours, theirs = (a[:, start : start + heads * h].reshape(len(a), heads, h) for a in (exact, bench.engine))
        start += heads * h
        apart = np.square(theirs[:, :, None] - ours[:, None, :]).sum(axis=(0, 3))  # [engine's head, right head]
        order = apart.argmin(axis=1)
        if len(set(order.tolist())) == heads and not np.array_equal(order, np.arange(heads)):
            yield field, order


def heats(bench: Bench) -> Iterator[float]:
    """What the scores were multiplied with before the softmax: the slope of its logarithm against them."""
    p, s = bench.engine, bench.x[0]
    with np.errstate(all="ignore"):
        logs = np.log(p)
    weight = np.where((p > 1e-4) & np.isfinite(logs), p, 0.0)
    total = np.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    logs = np.where(weight > 0, logs, 0.0)
    s, logs = (v - (weight * v).sum(axis=-1, keepdims=True) / total for v in (np.where(weight > 0, s, 0.0), logs))
    size = float((weight * np.square(s)).sum())
    factor = float((weight * s * logs).sum()) / size if size else 1.0
    root = math.sqrt(bench.config.head_dim)
    nice = [1 / root, root, rounded(factor, 2), rounded(factor, 3)]
    if factor > 0 and abs(factor - 1) > 1e-3:
        yield from dict.fromkeys((*(value for value in nice if abs(value / factor - 1) < 1e-2), factor))
