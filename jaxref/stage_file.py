"""One tensor's file while it is written: whole, or in blocks of query rows, with its digest and its figures."""

from __future__ import annotations

import hashlib
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxref.aprt import aprt_header
from jaxref.safetensors_stages import safetensors_header
from jaxref.stage import Stage
from jaxref.tree import stage_path
from jaxref.writing import temporary_of
from weights import UserError

AT_ONCE = 1 << 18  # numbers that stay in a core's own cache while they are summed, written and hashed
CHUNK = 1 << 16  # and in the first ones while they are summed
SHOWN = ("min", "max", "rms")  # of the figures, where there is room for a few


class Figures:
    """min, max, mean and rms of the finite values, and how many are NaN or infinite; sums in float64."""

    def __init__(self) -> None:
        self.count = self.nan = self.inf = 0
        self.total = self.squares = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take in the values of an array of floats."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            wide = part.astype(np.float64)
            total = float(wide.sum())
            if not math.isfinite(total):
                wide = self._finite(wide)
                total = float(wide.sum())
            if wide.size:
                self.low, self.high = min(self.low, float(wide.min())), max(self.high, float(wide.max()))
            self.count, self.total = self.count + wide.size, self.total + total
            # Not np.dot: BLAS would use threads of its own, against those that compute (measured: 100 times slower).
            self.squares += float(np.square(wide, out=wide).sum())

    def _finite(self, wide: np.ndarray) -> np.ndarray:
        """The finite values; the others are counted."""
        finite = np.isfinite(wide)
        nan = int(np.isnan(wide).sum())
        self.nan, self.inf = self.nan + nan, self.inf + int((~finite).sum()) - nan
        return wide[finite]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; None where no value is finite."""
        n = self.count
        return {
            "min": self.low if n else None,
            "max": self.high if n else None,
            "mean": self.total / n if n else None,
            "rms": math.sqrt(self.squares / n) if n else None,
            "nan": self.nan,
            "inf": self.inf,
        }


def figures_of(values: np.ndarray) -> dict[str, float]:
    """min, max and rms of the finite values of an array; nothing where none is finite."""
    figures = Figures()
    figures.add(values)
    return {name: value for name, value in figures.to_json().items() if name in SHOWN and value is not None}


class StageFile:
    """Writes one stage of one layer below `folder`. Blocks come as rows of the stage's query axis, in order."""

    def __init__(
        self, folder: Path, stage: Stage, layer: int | None, shape: tuple[int, ...], form: str, dtype: Any
    ) -> None:
        self.stage, self.layer, self.shape = stage, layer, shape
        self.dtype = np.dtype(np.float32) if form == "aprt" else np.dtype(dtype)
        self.path = stage_path(layer, stage.name, form)
        self._target = folder / self.path
        self._temporary = temporary_of(self._target)
        self._header = (
            aprt_header(layer, shape) if form == "aprt" else safetensors_header(stage.name, layer, shape, self.dtype)
        )
        self._figures, self._row, self._digest = Figures(), 0, hashlib.sha256()
        self._target.parent.mkdir(exist_ok=True)
        self._file = self._temporary.open("x+b")
        try:
            self._put(self._header)
        except BaseException:
            self.discard()  # a full disk: nobody else knows of this file yet
            raise

    def write(self, block: np.ndarray) -> bool:
        """Write the next rows; True when the tensor is whole."""
        values = np.ascontiguousarray(block, self.dtype)
        axis = self.stage.row_axis
        if values.shape[axis] == self.shape[axis]:
            flat = values.reshape(-1)
            for start in range(0, flat.size, AT_ONCE):
                part = flat[start : start + AT_ONCE]
                self._figures.add(part)
                self._put(part.view(np.uint8).data)
        else:
            self._figures.add(values)
            self._put_rows(values, axis)
        self._row += values.shape[axis]
        return self._row == self.shape[axis]

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)

    def _put_rows(self, values: np.ndarray, axis: int) -> None:
        """A block of rows that do not lie together in the file: one run for each index before the row axis."""
        runs = values.reshape(math.prod(self.shape[:axis]), -1)
        whole = math.prod(self.shape[axis:]) * self.dtype.itemsize
        inner = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        for index, run in enumerate(runs):
            self._file.seek(len(self._header) + index * whole + self._row * inner)
            self._file.write(run.view(np.uint8).data)
        if self._row + values.shape[axis] == self.shape[axis]:
            self._file.seek(0)
            self._digest = hashlib.file_digest(self._file, "sha256")

    def close(self, stated: str | None = None) -> dict[str, Any]:
        """Rename the file to its name and return its line of the manifest.

        Raises `UserError` where its SHA-256 is not the `stated` one; the file of that name then stays as it is.
        """
        digest = self._digest.hexdigest()
        try:
            self._file.close()
            if stated not in (None, digest):
                raise UserError(
                    f"{self._target}: other bytes than its manifest says came out: other weights under the same header,"
                    " or another machine; choose another --output"
                )
            self._temporary.replace(self._target)
        except BaseException:
            self.discard()
            raise
        return {
            "path": self.path,
            "stage": self.stage.name,
            "layer": self.layer,
            "shape": list(self.shape),
            "axes": list(self.stage.axes),
            "dtype": self.dtype.name,
            "sha256": digest,
            **self._figures.to_json(),
        }

    def discard(self) -> None:
        """Leave nothing of an unfinished file."""
        with suppress(OSError):  # what is still buffered may not fit on the disk either
            self._file.close()
        with suppress(OSError):  # the fault that led here is the one to tell; the next dump looks for what is left
            self._temporary.unlink(missing_ok=True)
