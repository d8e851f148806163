"""What a person reads after a dump: tables on stdout, a progress bar and notes on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxref.dump import Job, Report
from jaxref.selection import Selection
from jaxref.stage import DIMENSIONS, Stage
from jaxref.stages import STAGES
from jaxref.tree import stage_path
from weights import Config, Tokenizer
from weights.errors import printable

LIKELIEST = 5
WIDE = 100  # columns of a terminal


def console() -> Console:
    """Standard output; piped, as wide as a table wants to be."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def say(out: Console, text: str) -> None:
    """A line of text, never broken: paths and tokens are there to be copied."""
    out.print(text, soft_wrap=True)


@contextmanager
def progress_bar(count: int, *, quiet: bool, what: str = "layer") -> Iterator[Callable[[int], None]]:
    """A bar over the layers, or over so many of something else, on a terminal's stderr; silent elsewhere."""
    columns = [TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as progress:
        task = progress.add_task(what, total=count)
        yield lambda place: progress.update(task, completed=place + 1)


def human(size: float) -> str:
    """Bytes in the unit a person would choose."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def next_tokens(logits: np.ndarray | None, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """The likeliest next tokens: id, text where there is a tokenizer, logit, probability."""
    if logits is None or not np.isfinite(logits).all():
        return []
    weights = np.exp(logits - logits.max())
    best = np.argsort(-logits, kind="stable")[:LIKELIEST]
    return [
        {
            "id": int(i),
            "text": tokenizer.decode([int(i)]) if tokenizer else None,
            "logit": float(logits[i]),
            "probability": float(weights[i] / weights.sum()),
        }
        for i in best
    ]


def print_plan(rows: list[dict[str, Any]], job: Job) -> None:
    """What would be written."""
    table = Table("stage", "axes", "shape", "files", "bytes")
    for row in rows:
        axes, shape = "[" + ", ".join(row["axes"]) + "]", "[" + ", ".join(map(str, row["shape"])) + "]"
        table.add_row(row["stage"], _plain(axes), _plain(shape), str(row["files"]), human(row["bytes"]))
    out = console()
    out.print(table)
    files, size = sum(row["files"] for row in rows), human(sum(row["bytes"] for row in rows))
    name, output = _plain(job.checkpoint.name), _plain(job.output)
    say(out, f"{name}, {len(job.tokens)} tokens: {files} files, {size} into {output}; not written.")


def _plain(text: object) -> str:
    """A name or a shape as it is: its square brackets are no markup, and no terminal obeys it."""
    return escape(printable(text))


def print_report(report: Report, job: Job, likeliest: list[dict[str, Any]], seconds: float) -> None:
    """Stages with their range over all layers, where the files are, and what the model would say next."""
    out = console()
    # In a narrow window the names matter more than where their files are, which the names tell anyway.
    columns = ["stage", "shape", "layers", "min", "max", "rms", *(["file"] if out.width >= WIDE else [])]
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for stage in job.selection.stages:
        entries = [entry for entry in report.files if entry["stage"] == stage]
        if entries:
            table.add_row(*_row(stage, entries)[: len(columns)])
    name = _plain(job.checkpoint.name)
    say(out, f"[b]{name}[/b], {job.numerics.name}, {len(job.tokens)} tokens {_tokens(job.tokens)}")
    out.print(table)
    say(out, f"{len(report.files)} files, {human(report.size)} written, {human(report.read)} of weights read")
    say(out, f"{seconds:.1f} s. Manifest: {_plain(report.manifest)}")
    if job.numerics.name == "float64" and job.form == "aprt":
        say(out, "APRT holds float32: the float64 values were rounded once. --format safetensors keeps them.")
    for entry in report.files:
        if entry["nan"] or entry["inf"]:
            say(out, f"[b]{entry['path']}[/b] is the first with {entry['nan']} NaN and {entry['inf']} infinite values.")
            break
    for place, token in enumerate(likeliest, start=1):
        text = "" if token["text"] is None else f" {token['text']!r}"
        say(out, f"next {place}: {token['id']}{_plain(text)}, logit {token['logit']:.4f}, {token['probability']:.1%}")


def _row(name: str, entries: list[dict[str, Any]]) -> list[str]:
    layers = [entry["layer"] for entry in entries]
    low = [entry["min"] for entry in entries if entry["min"] is not None]
    high = [entry["max"] for entry in entries if entry["max"] is not None]
    rms = [entry["rms"] for entry in entries if entry["rms"] is not None]
    span = "model" if layers[0] is None else _span(layers)
    path = entries[0]["path"] if len(entries) == 1 else entries[0]["path"].replace(f"layer-{layers[0]}/", "layer-*/")
    shape = "[" + ", ".join(map(str, entries[0]["shape"])) + "]"
    figures = [f"{min(low):.4g}", f"{max(high):.4g}", f"{np.median(rms):.4g}"] if low else ["NaN", "NaN", "NaN"]
    return [name, _plain(shape), span, *figures, path]


def _span(layers: list[int]) -> str:
    """0…23 for a run of layers, else a list."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}…{layers[-1]}"
    return ",".join(map(str, layers))


def _tokens(tokens: list[int], many: int = 16) -> str:
    return ",".join(map(str, tokens[:many])) + (",…" if len(tokens) > many else "")


def print_stages(config: Config | None) -> None:
    """The table of stages; of one model, with numbers in the shapes."""
    table = Table("stage", "kind", "shape", "where", "meaning", box=None, pad_edge=False)
    for stage in STAGES.values():
        where = "model" if stage.scope == "model" else _layers_of(stage, config)
        if where:
            table.add_row(
                stage.name, "canonical" if stage.canonical else "extension", _shape(stage, config), where, stage.meaning
            )
    out = console()
    out.print(table)
    out.print("\n" + " · ".join(f"{letter} {meaning}" for letter, meaning in DIMENSIONS.items()))


def _layers_of(stage: Stage, config: Config | None) -> str:
    if config is None:
        return "layer 0" if stage.scope == "first" else "layers"
    return _span([i for i in range(config.num_hidden_layers) if stage.exists(config, i)])


def _shape(stage: Stage, config: Config | None) -> str:
    axes = list(stage.axes)
    if config is not None:
        axes = ["S" if axis == "S" else str(size) for axis, size in zip(axes, stage.shape(config, 0), strict=True)]
    return _plain("[" + ", ".join(axes) + "]") + (" last" if stage.last else "")


def plan_json(rows: list[dict[str, Any]], selection: Selection) -> dict[str, Any]:
    """The plan for machines."""
    files = [stage_path(*key) for key in selection.keys()]
    return {"stages": rows, "files": files, "bytes": sum(row["bytes"] for row in rows)}
