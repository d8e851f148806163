"""APRT, the file of one tensor: 12 bytes of header and float32 values (the stage contract)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from weights import UserError
from weights.extent import Extent
from weights.watched import Version, begun

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")  # magic, layer, number of float32 that follow


def aprt_header(layer: int | None, shape: tuple[int, ...]) -> bytes:
    """12 bytes; layer None is a whole-model stage. Raises `UserError` for a tensor that the format cannot count."""
    count = math.prod(shape)
    if count > 0xFFFFFFFF:
        raise UserError(f"a tensor of shape {list(shape)} is too large for APRT; ask for fewer --positions")
    return HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, count)


def open_aprt(path: Path, version: Version | None = None) -> tuple[int | None, Extent]:
    """The layer (None: whole model) and the values [dim_product] float32, read when they are asked for.

    Raises `UserError` where the file is missing, no APRT file, longer or shorter than its header says, or no longer
    of `version`; and at each reading where it has changed.
    """
    file, head = begun(path, version, HEADER.size)
    if len(head) < HEADER.size or head[:4] != MAGIC:
        raise UserError(f"{path}: no APRT file (it begins with {head[:4]!r}, not {MAGIC!r})")
    _, layer, count = HEADER.unpack(head)
    size, wanted = file.version.size, HEADER.size + 4 * count
    if size != wanted:
        raise UserError(f"{path}: {size} bytes, but its header says {count} values, that is {wanted}")
    return (None if layer == WHOLE_MODEL else layer), Extent(file, HEADER.size, np.dtype("<f4"), (count,))


def read_aprt(path: Path) -> tuple[int | None, np.ndarray]:
    """The layer (None: whole model) and the values [dim_product] float32 as a lazy read-only map.

    For who knows that the file stays as it is: reading the map of one that was cut ends the process (SIGBUS), and of
    one that is written it mixes old and new. Raises `UserError` as `open_aprt`.
    """
    layer, values = open_aprt(path)
    return layer, values.map()
