"""One safetensors file, memory-mapped: views of tensors, and the pages given back when they have been used."""

from __future__ import annotations

import hashlib
import math
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from weights.errors import UserError, brief, plain
from weights.files import parse_json
from weights.mapped import MappedFile, OfMap

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What a tree's file may hold besides: the experts' ids.
WHOLE: dict[str, np.dtype[Any]] = {
    f"{sign}{8 * size}": np.dtype(f"<{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)
}
MOST_AXES = 8


class SafetensorsFile(OfMap):
    """Views of the tensors of one file. The `safetensors` package checks the file; the map is ours, to bound memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._opened()
        self._map = self._file.bytes
        length = int.from_bytes(self._map[:8], "little")
        self._data = 8 + length
        header = self._header(self._map[8 : self._data])
        header.pop("__metadata__", None)
        self.entries = header
        self.header_sha256 = hashlib.sha256(self._map[: self._data]).hexdigest()
        self.bytes_read = 0
        self._lock = threading.Lock()

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            return parse_json(text)  # a name that is there twice is one tensor to some readers and another to others
        except ValueError as error:
            raise UserError(f"{self.path}: not a whole safetensors file: {plain(error)}") from None

    def _opened(self) -> MappedFile:
        try:
            mapped = MappedFile(self.path)
            with safe_open(self.path, framework="np"):
                pass
            mapped.check()  # so that what was found whole is what is mapped
            return mapped
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a whole safetensors file: {plain(error)}") from None

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self._map)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the header states. Raises `UserError` for a tensor without values, whose axes may have any size."""
        shape = tuple(self.entries[name]["shape"])
        if 0 in shape or len(shape) > MOST_AXES:
            raise UserError(f"{self.path}: {brief(name)} has shape {brief(shape)}: no values, or too many axes")
        return shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype on disk. Raises `UserError` for one that holds no plain floats."""
        stated = self.entries[name]["dtype"]
        if stated not in DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {stated}; supported are {', '.join(DTYPES)}")
        return DTYPES[stated]

    def stored_as(self, name: str) -> str:
        """The dtype on disk, for people. Raises `UserError` for one that holds no plain floats."""
        return str(self.dtype(name))

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A read-only view of rows `start:stop` of the first axis; nothing is read until the view is.

        A scalar is one row. Raises `UserError` for a dtype that is neither of `DTYPES` nor of `WHOLE`, and where the
        file is no longer the one that was opened.
        """
        view = self._view(name, start, stop)
        self._count(view.nbytes)
        return view

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """Copies of these rows of the first axis; no others are read. Raises `UserError` as `tensor`."""
        found = self._view(name)[places]
        self._count(found.nbytes)
        return found

    def _view(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self._file.check()
        shape = self.shape(name) or (1,)
        dtype = WHOLE.get(self.entries[name]["dtype"]) or self.dtype(name)
        stop = shape[0] if stop is None else min(stop, shape[0])
        row = math.prod(shape[1:])
        offset = self._data + self.entries[name]["data_offsets"][0] + start * row * dtype.itemsize
        view = np.frombuffer(self._map, dtype, (stop - start) * row, offset)
        return view.reshape(stop - start, *shape[1:])

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size
