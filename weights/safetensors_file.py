"""One safetensors file, memory-mapped: views of tensors, and the pages given back when they have been used."""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from weights.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class SafetensorsFile:
    """Views of the tensors of one file. The `safetensors` package checks the file; the map is ours, to bound memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._validate()
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._map[:8], "little")
        self._data = 8 + length
        header: dict[str, Any] = json.loads(self._map[8 : self._data])
        header.pop("__metadata__", None)
        self.entries = header
        self.header_sha256 = hashlib.sha256(self._map[: self._data]).hexdigest()
        self.bytes_read = 0
        self._lock = threading.Lock()

    def _validate(self) -> None:
        try:
            with safe_open(self.path, framework="np"):
                pass
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a whole safetensors file: {error}") from None

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self._map)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the header states."""
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype on disk. Raises `UserError` for one that holds no plain floats."""
        stated = self.entries[name]["dtype"]
        if stated not in DTYPES:
            raise UserError(f"{self.path}: {name} is stored as {stated}; supported are {', '.join(DTYPES)}")
        return DTYPES[stated]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A read-only view of rows `start:stop` of the first axis; nothing is read until the view is."""
        shape, dtype = self.shape(name), self.dtype(name)
        stop = shape[0] if stop is None else min(stop, shape[0])
        row = int(np.prod(shape[1:], dtype=np.int64))
        offset = self._data + self.entries[name]["data_offsets"][0] + start * row * dtype.itemsize
        view = np.frombuffer(self._map, dtype, (stop - start) * row, offset)
        with self._lock:
            self.bytes_read += view.nbytes
        return view.reshape(stop - start, *shape[1:])

    def release(self) -> None:
        """Give the file's pages back to the system; views stay valid and would read the file again."""
        self._map.madvise(mmap.MADV_DONTNEED)
