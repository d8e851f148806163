"""Two tensors of any size made small enough to draw: a map of their difference, and histograms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxref.stage import QKV
from oracle.coordinates import heads_of
from oracle.layouts import Block, Pair

ROWS, COLUMNS = 128, 256  # cells of a map at most
BINS = 60
DECADES = (-10.0, 2.0)  # of the histogram of differences


@dataclass(frozen=True)
class Differences:
    """What two tensors' pictures need; everything is in units of the reference's rms.

    `cells` [rows, columns] hold the greatest |test − reference| below them, NaN where one is not finite.
    """

    cells: np.ndarray
    row_name: str
    row_labels: list[int]  # what the first entry of each row is called
    column_name: str
    column_count: int
    heads: list[str]  # the names of those that lie side by side in a row; empty where none do
    values: np.ndarray  # [2, BINS]: how often a value of the reference (test) occurs
    reach: float  # the values' histogram goes from minus this to this
    errors: np.ndarray  # [BINS]: how often log10 of a difference occurs
    equal: int
    count: int


def differences(pair: Pair) -> Differences:
    """Read a pair twice, block by block: for its size, and for its pictures."""
    rms, reach = _size(pair)
    by_head = pair.stage.axes[0] == "H"
    tall = pair.outer if by_head else len(pair.positions)
    rows, columns = _edges(tall, ROWS), _edges(pair.columns, COLUMNS)
    cells = np.zeros((len(rows), len(columns)))
    values, errors, equal, count = np.zeros((2, BINS)), np.zeros(BINS), 0, 0
    for block, ours, theirs, used in _blocks(pair, rms):
        difference = np.abs(theirs - ours)
        difference[np.isinf(difference)] = np.nan
        first = np.full(len(ours), block.origin[0]) if by_head else block.origin[1] + np.arange(len(ours))
        wide = np.maximum.reduceat(np.where(used, difference, 0.0), columns, axis=1)
        np.maximum.at(cells, np.searchsorted(rows, first, side="right") - 1, wide)
        good = used & np.isfinite(difference)
        for side, part in zip(values, (ours, theirs), strict=True):
            side += np.histogram(part[good], BINS, (-reach, reach))[0]
        known = difference[good]
        equal, count = equal + int((known == 0).sum()), count + known.size
        errors += np.histogram(np.clip(np.log10(known[known > 0]), *DECADES), BINS, DECADES)[0]
    labels = rows.tolist() if by_head else [pair.positions[row] for row in rows]
    names = "head" if by_head else "token", "key" if by_head else _word(pair)
    heads = _head_names(pair)
    return Differences(cells, names[0], labels, names[1], pair.columns, heads, values, reach, errors, equal, count)


def _head_names(pair: Pair) -> list[str]:
    if pair.stage.axes[-1] == QKV:
        counts = ("q", pair.dims["H"]), ("k", pair.dims["K"]), ("v", pair.dims["K"])
        return [f"{part}{head}" for part, count in counts for head in range(count)]
    return [str(head) for head in range(heads_of(pair.stage, pair.dims) or 0)]


def _word(pair: Pair) -> str:
    words = {"V": "token id", "E": "expert", "A": "rank"}
    return words.get(pair.stage.axes[-1], "channel")


def _edges(count: int, most: int) -> np.ndarray:
    """Where each of at most `most` equal parts of `count` things begins."""
    parts = min(count, most)
    return np.arange(parts) * count // parts


def _size(pair: Pair) -> tuple[float, float]:
    """The reference's rms, and the greatest finite value of both in units of it."""
    squares, count, greatest = 0.0, 0, 0.0
    for _, ours, theirs, used in _blocks(pair, 1.0):
        mine = np.where(used & np.isfinite(ours), ours, 0.0)
        other = np.where(used & np.isfinite(theirs), theirs, 0.0)
        squares, count = squares + float(np.square(mine).sum()), count + int(used.sum())
        greatest = max(greatest, float(np.abs(mine).max()), float(np.abs(other).max()))
    rms = math.sqrt(squares / count) if squares else 1.0
    return rms, greatest / rms or 1.0


def _blocks(pair: Pair, rms: float) -> Iterator[tuple[Block, np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks with both sides as float64 in units of `rms`, and which values are comparable."""
    for block in pair.blocks():
        ours, theirs = (part.astype(np.float64) / rms for part in (block.reference, block.test))
        used = np.ones(ours.shape, bool) if block.visible is None else np.broadcast_to(block.visible, ours.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            yield block, ours, theirs, used
