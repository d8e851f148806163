"""The APRT file: 12 bytes of header and float32 values, one tensor a file (`docs/decisions.md`, the stage contract)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np

from weights import UserError
from weights.files import regular

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")  # magic, layer, number of float32 that follow
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}


def aprt_header(layer: int | None, shape: tuple[int, ...]) -> bytes:
    """12 bytes; layer None is a whole-model stage. Raises `UserError` for a tensor that the format cannot count."""
    count = math.prod(shape)
    if count > 0xFFFFFFFF:
        raise UserError(f"a tensor of shape {list(shape)} is too large for APRT; ask for fewer --positions")
    return HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, count)


def safetensors_header(stage: str, layer: int | None, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of a safetensors file with one tensor, so that its values can be written in blocks after it."""
    size = math.prod(shape) * dtype.itemsize
    entry = {"dtype": SAFETENSORS_NAMES[dtype.name], "shape": list(shape), "data_offsets": [0, size]}
    meta = {"layer": "whole-model" if layer is None else str(layer)}
    text = json.dumps({"__metadata__": meta, stage: entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_aprt(path: Path) -> tuple[int | None, np.ndarray]:
    """The layer (None: whole model) and the values [dim_product] float32 as a lazy read-only map.

    Raises `UserError` where the file is missing, no APRT file, or longer or shorter than its header says.
    """
    try:
        size = regular(path).stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(head) < HEADER.size or head[:4] != MAGIC:
        raise UserError(f"{path}: no APRT file (it begins with {head[:4]!r}, not {MAGIC!r})")
    _, layer, count = HEADER.unpack(head)
    if size != HEADER.size + 4 * count:
        raise UserError(f"{path}: {size} bytes, but its header says {count} values, that is {HEADER.size + 4 * count}")
    values = np.memmap(path, "<f4", "r", HEADER.size, (count,)) if count else np.zeros(0, np.float32)
    return (None if layer == WHOLE_MODEL else layer), values
