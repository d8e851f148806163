"""Two files of one stage brought to the same positions and the same layout, and read side by side in blocks.

Every stage is seen as [outer, rows, columns]: rows are query positions, and outer is 1, or H for attention's maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxref.stage import Stage, axis_size
from oracle.coordinates import column_names
from oracle.tensor_file import TensorFile
from oracle.trees import Tree
from weights import UserError
from weights.extent import Extent

BLOCK = 1 << 15  # values of a block: four float64 copies of it stay in the cache
AT_ONCE = 16  # blocks that are read at once: a reading is several calls of the system, each a wait for other threads


@dataclass(frozen=True)
class View:
    """One file's values as [outer, rows, columns], or [heads, rows, h] where q or k lies head-major."""

    file: TensorFile
    values: Extent | np.ndarray  # [outer, rows, columns]; a block of them is read when it is asked for
    positions: tuple[int, ...]  # of the rows
    heads_first: bool = False
    order: np.ndarray | None = None  # [rows, A]: for each of the reference's ranks, this file's

    @property
    def columns(self) -> int:
        """Columns of a row in the contract's layout."""
        return self.values.shape[2] * (self.values.shape[0] if self.heads_first else 1)

    def head_major(self, heads: int) -> View:
        """The same bytes read as [heads, rows, h]."""
        _, rows, columns = self.values.shape
        return replace(self, values=self.values.reshape(heads, rows, columns // heads), heads_first=True)

    def block(self, outer: int, rows: slice | np.ndarray) -> np.ndarray:
        """Some rows [rows, columns] in the contract's layout."""
        if self.heads_first:
            return np.concatenate([self.values[head, rows] for head in range(self.values.shape[0])], axis=1)
        part = self.values[outer, rows]
        if self.order is None:
            return part
        order = self.order[rows]
        ranked = part.reshape(*order.shape, -1)
        return np.take_along_axis(ranked, order[:, :, None], axis=1).reshape(part.shape)


class Misfit(UserError):
    """A file whose size fits no number of rows of its stage. `reason` says so without its name."""

    def __init__(self, path: Path, role: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.role, self.reason = role, reason


def view(tree: Tree, stage: Stage, file: TensorFile, dims: Mapping[str, int], single: int) -> View:
    """A file with the shape that the contract gives it for `dims` (S: all positions of the prompt).

    `single` is the position of a file with one row. Raises `Misfit` where the size fits no number of rows, and
    `UserError` for a stage that the model does not have.
    """
    outer = dims["H"] if stage.axes[0] == "H" else 1
    columns = math.prod(axis_size(axis, dims) for axis in stage.axes[stage.row_axis + 1 :])
    size = file.values.size
    if not outer * columns:
        raise UserError(f"{file.path}: by its config the reference's model has no {stage.name}")
    if outer == dims["H"] and stage.axes[0] == "H" and size == outer * (single + 1) and single + 1 < columns:
        columns = single + 1  # a decode step sees the keys so far
    rows, rest = divmod(size, outer * columns)
    stated = tree.stated_positions
    positions = stated if stated is not None and len(stated) == rows else _positions(rows, dims["S"], single)
    if rest or not rows or positions is None:
        raise Misfit(file.path, tree.role, _no_rows(stage, size, dims, outer, columns))
    if max(positions) >= dims["S"] or min(positions) < 0:
        raise UserError(f"{file.path}: holds position {max(positions)} of a prompt of {dims['S']} tokens")
    return View(file, file.values.reshape(outer, rows, columns), positions)


def _no_rows(stage: Stage, size: int, dims: Mapping[str, int], outer: int, columns: int) -> str:
    """What was expected, and what the file seems to hold instead."""
    sizes = ", ".join(str(axis_size(axis, dims)) for axis in stage.axes)
    words = f"{size} values fit no rows of [{', '.join(stage.axes)}] = [{sizes}]"
    count = dims["S"]
    rows, rest = divmod(size, outer * columns)
    keys, width = math.isqrt(size // outer), size // (outer * count)
    if rows and not rest:
        given = " (--positions)" if rows < count else ""
        return f"{words}: {rows} rows of {columns} values, the reference has {count} tokens{given}"
    if stage.axes[0] == "H" and size and size == outer * keys * keys:
        return f"{words}: {keys} x {keys} values a head, the reference has {count} tokens"
    if width and size == outer * count * width:
        return f"{words}: for {count} tokens {width} values each, the reference has {columns} (another model's?)"
    return words


def _positions(rows: int, count: int, single: int) -> tuple[int, ...] | None:
    """Which positions `rows` rows are: all of the prompt, the single one, or all up to it (a decoder's keys)."""
    if rows in (count, single + 1):
        return tuple(range(rows))
    return (single,) if rows == 1 else None


def single_position(tree: Tree, dims: Mapping[str, int]) -> int:
    """The position of files with one row: stated, or told by the keys of a decode step's scores, or the last."""
    stated = tree.stated_positions
    if stated is not None and len(stated) == 1:
        return stated[0]
    for key in tree.files:
        if key[1] in ("attn_scores", "attn_softmax") and stated is None and dims["H"]:
            keys, rest = divmod(tree.open(key).values.size, dims["H"])
            if not rest and 0 < keys < dims["S"]:
                return keys - 1
    return dims["S"] - 1


class Block(NamedTuple):
    """Rows of both tensors [rows, columns]; `origin` is (outer, row), `visible` what is comparable (None: all)."""

    reference: np.ndarray
    test: np.ndarray
    origin: tuple[int, int]
    channel: int | None
    visible: np.ndarray | None


@dataclass(frozen=True)
class Pair:
    """Two views of one stage at the positions that both (and the third tree, if any) have."""

    stage: Stage
    dims: Mapping[str, int]
    reference: View
    test: View
    positions: tuple[int, ...]
    matched: np.ndarray | None = None  # [positions, A]: whether the test chose this expert of the reference too

    @property
    def outer(self) -> int:
        """How many maps: H for attention, else 1."""
        return 1 if self.reference.heads_first else self.reference.values.shape[0]

    @property
    def columns(self) -> int:
        """Columns that both have (a decode step has fewer keys)."""
        return min(self.reference.columns, self.test.columns)

    @property
    def size(self) -> int:
        """Values on each side."""
        return self.outer * len(self.positions) * self.columns

    @property
    def channels(self) -> int:
        """Columns, or the heads of attention's maps."""
        return self.columns if self.stage.axes[0] == "S" else self.outer

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return min(len(self.positions), max(1, BLOCK // self.columns))

    def blocks(self) -> Iterator[Block]:
        """Both tensors side by side. Raises `UserError` where one of the files has changed."""
        step, once = self.block_rows, self.block_rows * AT_ONCE
        for outer in range(self.outer):
            channel = outer if self.stage.axes[0] == "H" else None
            for first in range(0, len(self.positions), once):
                ours, theirs = self._read(outer, self.positions[first : first + once])
                for start in range(0, len(ours), step):
                    row = first + start
                    reference, test = (part[start : start + step] for part in (ours, theirs))
                    visible = self._visible(row, self.positions[row : row + step])
                    yield Block(reference, test, (outer, row), channel, visible)

    def _read(self, outer: int, positions: tuple[int, ...]) -> list[np.ndarray]:
        """Both sides at some positions, without the columns that one of them lacks."""
        sides = self.reference, self.test
        return [side.block(outer, _rows(side.positions, positions))[:, : self.columns] for side in sides]

    def _visible(self, row: int, positions: tuple[int, ...]) -> np.ndarray | None:
        """The causal triangle of the raw scores; of the experts' insides those that both have chosen."""
        if self.stage.name == "attn_scores":
            return np.arange(self.columns) <= np.asarray(positions)[:, None]
        if self.matched is None:
            return None
        return np.repeat(self.matched[row : row + len(positions)], self.columns // self.matched.shape[1], axis=1)

    def coordinate(self, place: tuple[int, int, int] | None) -> dict[str, Any] | None:
        """(outer, row, column) by the names of the axes: {"token": 3, "head": 5, "dim": 12}."""
        if place is None:
            return None
        outer, row, column = place
        found = {"token": self.positions[row]}
        if self.stage.axes[0] == "H":
            found["head"] = outer
        return found | column_names(self.stage.axes[self.stage.row_axis + 1 :], column, self.dims)


def _rows(have: tuple[int, ...], want: tuple[int, ...]) -> slice | np.ndarray:
    """Indices of the wanted positions; a slice where they lie together, which copies nothing."""
    first = have.index(want[0])
    if have[first : first + len(want)] == want:
        return slice(first, first + len(want))
    place = {position: index for index, position in enumerate(have)}
    return np.array([place[position] for position in want])
