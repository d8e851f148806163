"""What `python -m oracle weight` says of a tensor: for people, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from oracle.metrics import jsonable
from oracle.report import WIDTH, print_wrapped
from oracle.weight import Difference, Held, difference
from oracle.weight_tries import Fit, explained, left_by

SCHEMA = "jaxref-weight-v1"
MEANT = {
    "none": "the same values",
    "float32": "the same but for the rounding of float32",
    "float16": "the same, rounded to float16",
    "bfloat16": "the same, rounded to bfloat16",
}


@dataclass(frozen=True)
class Told:
    """The verdict on one tensor: the rounding that is left (None: it differs), by how much, and why."""

    held: Held
    left: str | None
    apart: Difference
    fits: list[Fit]

    @property
    def exit_code(self) -> int:
        """0 where nothing but rounding is left, else 1."""
        return 0 if self.left is not None else 1


def tell(held: Held) -> Told:
    """Compare a tensor with the checkpoint, and look for the cause where it differs."""
    left = left_by(held, held.right)
    return Told(held, left, difference(held, left), [] if left is not None else explained(held))


def print_weight(told: Told) -> None:
    """The verdict in a few lines."""
    out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for line in _lines(told):
        print_wrapped(out, line, 12)


def _lines(told: Told) -> Iterator[str]:
    held, apart = told.held, told.apart
    stored = f"{held.checkpoint.stored_as(held.name)} {list(held.checkpoint.shape(held.name))}"
    rows = "" if held.whole else f", rows {held.first}..{held.first + len(held.values)}"
    yield f"{held.name}: {stored}{rows}"
    if told.left is not None:
        yield f"{MEANT[told.left]}: relative L2 {apart.relative_l2:.3g}, {apart.count:,} values"
        return
    count = len(held.values)
    rows = "all rows" if apart.wrong_rows == count else f"{apart.wrong_rows:,} of {count:,} rows"
    yield f"differs: relative L2 {apart.relative_l2:.3g}; {apart.wrong:,} of {apart.count:,} values wrong, in {rows}"
    if apart.worst is not None:
        row, column, engine, right = apart.worst
        yield f"  worst     [{row}, {column}] is {engine:.6g}, the checkpoint has {right:.6g}"
    if places := _places(told):
        yield f"  where     {places}"
    for why in reasons(told):
        yield f"  because   {why}"
    if not told.fits:
        yield "  because   no reading that is known has the engine's values"


def reasons(told: Told) -> Iterator[str]:
    """The causes in words."""
    for fit in told.fits:
        rest = "" if fit.rounding == "none" else f", rounded to {fit.rounding}"
        yield f"{fit.reading.hypothesis}: {fit.reading.words}; so read, all values are the engine's{rest}"


def _places(told: Told) -> str:
    """Which numbers of which blocks of a row are wrong, where the weights lie in blocks and some are right."""
    size = block_of(told.held)
    if size is None:
        return ""
    wrong = told.apart.places.reshape(-1, size) > 0
    numbers, blocks = (np.asarray(wrong.any(axis=axis)) for axis in (0, 1))
    if wrong.all() or not wrong.any():
        return ""
    whose = f"each block of {size}" if blocks.all() else f"{_runs(blocks, 'block')} of {size} in a row"
    return f"{'all numbers' if numbers.all() else _runs(numbers, 'number')} of {whose}; the others are right"


def _runs(marks: np.ndarray, what: str) -> str:
    """Where marks [n] are set, as `numbers 3, 8-15`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]])))
    runs = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(edges[::2], edges[1::2], strict=True)]
    plural = "s" if marks.sum() > 1 else ""
    return f"{what}{plural} {', '.join(runs[:8])}{', …' if len(runs) > 8 else ''}"


def block_of(held: Held) -> int | None:
    """How many numbers of a row one block holds; None where they are not quantised."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = getattr(GGMLQuantizationType, held.checkpoint.stored_as(held.name), None)
    size = GGML_QUANT_SIZES[kind][0] if kind is not None else 1
    return size if size > 1 else None


def as_json(told: Told) -> dict[str, Any]:
    """The verdict as JSON values; what is infinite or not a number is null."""
    held, apart = told.held, told.apart
    worst = None
    if apart.worst is not None:
        row, column, engine, right = apart.worst
        worst = {"row": row, "column": column, "engine": jsonable(engine), "checkpoint": jsonable(right)}
    return {
        "schema": SCHEMA,
        "tensor": held.name,
        "stored_as": held.checkpoint.stored_as(held.name),
        "shape": list(held.checkpoint.shape(held.name)),
        "rows": [held.first, held.first + len(held.values)],
        "verdict": "differs" if told.left is None else "same",
        "rounding": told.left,
        "relative_l2": jsonable(apart.relative_l2),
        "values": apart.count,
        "wrong": apart.wrong,
        "wrong_rows": apart.wrong_rows,
        "worst": worst,
        "explanations": [
            {"hypothesis": fit.reading.hypothesis, "words": fit.reading.words, "rounding": fit.rounding}
            for fit in told.fits
        ],
    }
