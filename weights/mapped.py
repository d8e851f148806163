"""A file's bytes as a read-only map, with a watch on whether they are still those that were opened."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from weights.errors import UserError
from weights.upcast import read_into
from weights.watched import Version, Watched


class MappedFile:
    """A map of a file that somebody else may change.

    One that shrinks ends the process that reads its map (SIGBUS), and one that is written in place mixes two models; so
    `check` is asked before a view is handed out and after it was used. Between the two, nothing can be done.
    """

    def __init__(self, path: Path) -> None:
        """Raises `OSError` where there is no such file, `ValueError` where it is empty."""
        self.path, self.watched = path, Watched(path)
        self._file = path.open("rb")
        try:
            self.watched.hold(Version.of(os.fstat(self._file.fileno())))
            self.bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self._file.close()
            raise
        self._begin = np.frombuffer(self.bytes, np.uint8).ctypes.data

    def check(self) -> None:
        """Raise `UserError` where the file is gone, was replaced or was written since it was opened."""
        self.watched.check()

    def holds(self, view: np.ndarray) -> bool:
        """Whether a view's memory lies in this map."""
        return self._begin <= view.ctypes.data < self._begin + len(self.bytes)

    def copy(self, view: np.ndarray, out: np.ndarray) -> bool:
        """Fill `out` with the values of a contiguous view of this map, by reading the file and not the map.

        Returns whether all are finite in both dtypes. Raises `UserError` where the file ends before them.
        """
        try:
            return read_into(self._file.fileno(), view.ctypes.data - self._begin, view.dtype, out)
        except EOFError as error:
            raise UserError(f"{self.path}: changed while it was in use: {error}") from None

    def release(self) -> None:
        """Give the pages back to the system; views stay valid and would read the file again."""
        self.check()
        self.bytes.madvise(mmap.MADV_DONTNEED)


class OfMap:
    """What a file of tensors takes over from the map of its bytes."""

    _file: MappedFile

    @property
    def watched(self) -> Watched:
        """The file as it was when it was opened."""
        return self._file.watched

    def holds(self, view: np.ndarray) -> bool:
        """Whether a view's memory lies in this file."""
        return self._file.holds(view)

    def copy(self, view: np.ndarray, out: np.ndarray) -> bool:
        """Fill `out` with the values of a view that this file holds; `MappedFile.copy`."""
        return self._file.copy(view, out)

    def check(self) -> None:
        """Raise `UserError` where the file is no longer the one that was opened."""
        self._file.check()

    def release(self) -> None:
        """Give the file's pages back to the system; views stay valid and would read the file again.

        Raises `UserError` where the file is no longer the one that was opened: what came out of the views is not sound.
        """
        self._file.release()
