"""Files of one tensor: APRT, 12 bytes of header and float32 values (the stage contract), and safetensors."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from weights import UserError
from weights.errors import brief, plain
from weights.extent import Extent
from weights.files import parse_json
from weights.safetensors_file import DTYPES, MOST_AXES, WHOLE
from weights.watched import Version, Watched

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")  # magic, layer, number of float32 that follow
LONGEST_HEADER = 100_000_000  # bytes; the `safetensors` package reads no longer one
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


def open_aprt(path: Path, version: Version | None = None) -> tuple[int | None, Extent]:
    """The layer (None: whole model) and the values [dim_product] float32, read when they are asked for.

    Raises `UserError` where the file is missing, no APRT file, longer or shorter than its header says, or no longer
    of `version`; and at each reading where it has changed.
    """
    file, head = _begun(path, version, HEADER.size)
    if len(head) < HEADER.size or head[:4] != MAGIC:
        raise UserError(f"{path}: no APRT file (it begins with {head[:4]!r}, not {MAGIC!r})")
    _, layer, count = HEADER.unpack(head)
    size, wanted = file.version.size, HEADER.size + 4 * count
    if size != wanted:
        raise UserError(f"{path}: {size} bytes, but its header says {count} values, that is {wanted}")
    return (None if layer == WHOLE_MODEL else layer), Extent(file, HEADER.size, np.dtype("<f4"), (count,))


def open_safetensors(path: Path, version: Version | None = None) -> Extent:
    """The one tensor of a safetensors file in its own shape and dtype, a scalar as [1], read when it is asked for.

    Raises `UserError` where the file is missing, is not whole, holds no or several tensors, or is no longer of
    `version`; and at each reading where it has changed.
    """
    file, head = _begun(path, version, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(file.version.size - 8, LONGEST_HEADER):
        raise UserError(f"{path}: not a whole safetensors file: its header does not lie in it")
    header = _parsed(path, _begun(path, file.version, 8 + length)[1][8:])
    if len(header) != 1:
        raise UserError(f"{path}: holds {len(header)} tensors; a stage's file holds one")
    ((name, entry),) = header.items()
    dtype, shape = _form(path, name, entry)
    data = file.version.size - 8 - length
    offsets = entry.get("data_offsets")
    if not _numbers(offsets) or offsets != [0, data] or math.prod(shape) * dtype.itemsize != data:
        stated = f"{entry['dtype']} {brief(entry['shape'])} at {brief(offsets)}"
        raise UserError(f"{path}: not a whole safetensors file: {stated}, and {data} bytes follow its header")
    return Extent(file, 8 + length, dtype, shape)


def _begun(path: Path, version: Version | None, count: int) -> tuple[Watched, bytes]:
    """The file with its first bytes, fewer where it ends before."""
    try:
        file = Watched(path, version)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    with file.opened() as opened:
        return file, os.pread(opened, count, 0)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """The entries of a safetensors header, as the package takes them."""
    try:
        header = parse_json(text)  # a name that is there twice is one tensor to some readers and another to others
        stated = header.pop("__metadata__", None)
        if stated is not None and not all(isinstance(value, str) for value in stated.values()):
            raise ValueError("its metadata are no texts")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {plain(error)}") from None
    return header


def _form(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and the shape that a header states of a tensor."""
    stated, shape = (entry.get(key) for key in ("dtype", "shape")) if isinstance(entry, dict) else (None, None)
    if not _numbers(shape):
        raise UserError(f"{path}: not a whole safetensors file: {brief(name)} is {brief(entry)}")
    if 0 in shape or len(shape) > MOST_AXES:
        raise UserError(f"{path}: {brief(name)} has shape {brief(shape)}: no values, or too many axes")
    dtype = {**DTYPES, **WHOLE}.get(str(stated))
    if dtype is None:
        raise UserError(f"{path}: {brief(name)} is stored as {brief(stated)}; supported are {', '.join(DTYPES)}")
    return dtype, tuple(shape) or (1,)


def _numbers(stated: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers as JSON writes them: `0.0` and `false` are others."""
    return isinstance(stated, list) and all(type(number) is int and number >= 0 for number in stated)


def read_aprt(path: Path) -> tuple[int | None, np.ndarray]:
    """The layer (None: whole model) and the values [dim_product] float32 as a lazy read-only map.

    For who knows that the file stays as it is: reading the map of one that was cut ends the process (SIGBUS), and of
    one that is written it mixes old and new. Raises `UserError` as `open_aprt`.
    """
    layer, values = open_aprt(path)
    return layer, values.map()
