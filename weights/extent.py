"""Numbers in a file that somebody else may change, as an array that is read where it is asked for and never mapped.

A map of a file that becomes shorter ends the process that reads it; a read has an end, and a file that was written
meanwhile is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weights.errors import UserError
from weights.upcast import fill
from weights.watched import Watched


@dataclass(frozen=True)
class Extent:
    """An array of `shape` that lies row-major in a file from byte `offset` on.

    An index is numbers for the first axes, then a slice or a list of indices of the next; it gives a fresh array.
    Each reading raises `UserError` where the file is no longer the one that was opened.
    """

    file: Watched
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: int) -> Extent:
        """The same numbers by other axes."""
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.size} values have no shape {list(shape)}")
        return replace(self, shape=shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        *numbers, last = index if isinstance(index, tuple) else (index,)
        part = self
        for number in numbers:
            part = part._inner(number)
        if isinstance(last, slice):
            start, stop, step = last.indices(len(part))
            if step == 1:
                return part._read([(start, max(0, stop - start))])
            last = range(start, stop, step)
        elif np.ndim(last) == 0:
            return np.asarray(part._inner(last))
        return part._read(list(_runs(np.asarray(last, np.int64), len(part))))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("what lies in a file has to be read")
        values = self._read([(0, len(self))]) if self.shape else self.reshape(1)[:].reshape(())
        return values if dtype is None else values.astype(dtype, copy=False)

    def map(self) -> np.ndarray:
        """A read-only map of them, for who knows that the file stays: one that is cut ends the process (SIGBUS)."""
        if not self.size:
            return np.zeros(self.shape, self.dtype)
        try:
            values = np.memmap(self.file.path, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            self.file.check()
            raise UserError(f"{self.file.path}: not readable: {error}") from None
        self.file.check()
        return values

    def _inner(self, number: Any) -> Extent:
        """One entry of the first axis."""
        place, shape = operator.index(number), self.shape[1:]
        if not -len(self) <= place < len(self):
            raise IndexError(f"index {place} of an axis of {len(self)}")
        return replace(self, offset=self.offset + place % len(self) * self._row, shape=shape)

    @property
    def _row(self) -> int:
        """Bytes of an entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """Some entries of the first axis, as (first, how many) of each run of them."""
        out = np.empty((sum(count for _, count in runs), *self.shape[1:]), self.dtype)
        done = 0
        with self.file.opened() as file:
            for first, count in runs:
                fill(file, self.offset + first * self._row, out[done : done + count])
                done += count
        return out


def _runs(places: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Indices of an axis as (first, how many) of those that follow one another."""
    if places.size and not 0 <= places.min() <= places.max() < length:
        raise IndexError(f"indices {places.min()} to {places.max()} of an axis of {length}")
    for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
        if run.size:
            yield int(run[0]), run.size
