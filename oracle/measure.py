"""One pair of files measured: its figures, its layout, and where it is worst."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxref.stages import Key
from oracle.coordinates import heads_of
from oracle.layouts import Pair
from oracle.metrics import Figures, Logits, Sums

# Head-major q or k is told by this: read that way, the error is so many times smaller.
LAYOUT_GAIN = 10.0
LAYOUT_DOUBT = 0.02  # relative L2 from which another layout is tried


@dataclass(frozen=True)
class Measured:
    """A pair with its figures, and its layout in words where that is not the contract's."""

    pair: Pair
    figures: Figures
    layout: str | None = None


@dataclass(frozen=True)
class Stagewise:
    """One stage measured in all trees. `between`: test and yardstick from each other, where it may matter.

    `after_tie`: at every position another expert ran before, by a near tie; `fewer`: such positions are left out.
    """

    key: Key
    test: Measured
    hf: Measured | None
    between: Figures | None
    after_tie: bool
    fewer: bool

    @property
    def unmatched(self) -> bool:
        """Whether there is nothing to compare, because no expert of the reference was chosen by the test."""
        return self.test.pair.matched is not None and not self.test.figures.count and not self.test.figures.mismatched

    def notes(self) -> list[str]:
        """What a reader should know about how it was measured."""
        notes = [f"test is {self.test.layout}"] if self.test.layout else []
        notes += [f"yardstick is {self.hf.layout}"] if self.hf and self.hf.layout else []
        return notes + (["positions after a near-tie swap of experts left out"] if self.fewer else [])


def measure(pair: Pair, dtype: str) -> Measured:
    """The figures of a pair; q or k that fits only when read head-major is read so."""
    figures = _sum(pair, dtype)
    heads = heads_of(pair.stage, pair.dims) if pair.stage.axes[-1] in ("Hh", "Kh") else None
    rows = len(pair.test.positions)
    if heads is None or heads == 1 or rows == 1 or figures.relative_l2 < LAYOUT_DOUBT or pair.test.heads_first:
        return Measured(pair, figures)
    turned = replace(pair, test=pair.test.head_major(heads))
    better = _sum(turned, dtype)
    if better.relative_l2 * LAYOUT_GAIN > figures.relative_l2:
        return Measured(pair, figures)
    return Measured(turned, better, f"head-major {[heads, rows, pair.dims['h']]}, not {[rows, heads * pair.dims['h']]}")


def _sum(pair: Pair, dtype: str) -> Figures:
    sums = Sums(dtype, pair.size, pair.channels, pair.block_rows * pair.columns)
    if pair.stage.name == "lm_head":
        sums.logits = Logits()
    for block in pair.blocks():
        sums.add(*block)
        if sums.logits is not None:
            sums.logits.add(block.reference, block.test)
    return sums.figures()


def worst_place(pair: Pair) -> dict[str, Any]:
    """The token and the head with the greatest relative L2, each over all of its values."""
    heads = heads_of(pair.stage, pair.dims)
    groups = heads or 1  # of columns; attention's maps have none, there a head is a map
    squares = np.zeros((2, len(pair.positions), pair.outer * groups))
    for block in pair.blocks():
        r = np.nan_to_num(block.reference.astype(np.float64), posinf=0.0, neginf=0.0)
        t = np.nan_to_num(block.test.astype(np.float64), nan=np.inf, posinf=np.inf)
        d = t - r if block.visible is None else np.where(block.visible, t - r, 0.0)
        first, row = block.origin
        for part, values in zip(squares, (d, r), strict=True):
            sums = np.square(values).reshape(len(values), groups, -1).sum(axis=2)
            part[row : row + len(values), first : first + groups] += sums
    return _worst(squares, pair, with_heads=squares.shape[2] > 1)


def _worst(squares: np.ndarray, pair: Pair, *, with_heads: bool) -> dict[str, Any]:
    with np.errstate(all="ignore"):
        tokens = np.nan_to_num(np.sqrt(squares[0].sum(axis=1) / squares[1].sum(axis=1)), nan=0.0, posinf=np.inf)
        heads = np.nan_to_num(np.sqrt(squares[0].sum(axis=0) / squares[1].sum(axis=0)), nan=0.0, posinf=np.inf)
    found: dict[str, Any] = {"token": pair.positions[int(tokens.argmax())], "token_relative_l2": float(tokens.max())}
    if with_heads:
        found |= {"head": int(heads.argmax()), "head_relative_l2": float(heads.max())}
    return found
