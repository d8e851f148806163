"""Safetensors files of stages: one tensor as `dump --format safetensors` writes it, or a whole tree's in one file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from weights import UserError
from weights.errors import brief, plain
from weights.extent import Extent
from weights.files import parse_json
from weights.safetensors_file import DTYPES, MOST_AXES, WHOLE
from weights.watched import Version, begun

LONGEST_HEADER = 100_000_000  # bytes; the `safetensors` package reads no longer one
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}


def safetensors_header(stage: str, layer: int | None, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of a safetensors file with one tensor, so that its values can be written in blocks after it."""
    size = math.prod(shape) * dtype.itemsize
    entry = {"dtype": SAFETENSORS_NAMES[dtype.name], "shape": list(shape), "data_offsets": [0, size]}
    meta = {"layer": "whole-model" if layer is None else str(layer)}
    text = json.dumps({"__metadata__": meta, stage: entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def open_safetensors(path: Path, version: Version | None = None) -> Extent:
    """The one tensor of a safetensors file in its own shape and dtype, a scalar as [1], read when it is asked for.

    Raises `UserError` where the file is missing, is not whole, holds no or several tensors, or is no longer of
    `version`; and at each reading where it has changed.
    """
    found = open_all(path, version)
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} tensors; a stage's file holds one")
    return next(iter(found.values()))


def open_all(
    path: Path, version: Version | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Extent]:
    """All tensors of a safetensors file by their names, each as `open_safetensors` gives one.

    Those whose names are not `wanted` may be of any type and size, and are the bytes that they lie in. Raises
    `UserError` where the file is missing, is not whole, or is no longer of `version`; at each reading where it has
    changed.
    """
    file, head = begun(path, version, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(file.version.size - 8, LONGEST_HEADER):
        raise UserError(f"{path}: not a whole safetensors file: its header does not lie in it")
    entries = _parsed(path, begun(path, file.version, 8 + length)[1][8:])
    found: dict[str, Extent] = {}
    places: list[tuple[int, int]] = []
    for name, entry in entries.items():
        start, stop = _place(path, name, entry)
        dtype, shape = _form(path, name, entry) if wanted(name) else (WHOLE["U8"], (stop - start,))
        if stop - start != math.prod(shape) * dtype.itemsize:
            stated = f"{entry['dtype']} {brief(list(shape))} at {start} to {stop}"
            raise UserError(f"{path}: not a whole safetensors file: {brief(name)} is {stated}")
        places.append((start, stop))
        found[name] = Extent(file, 8 + length + start, dtype, shape)
    end, data = 0, file.version.size - 8 - length
    for start, stop in sorted(places):  # one after another, with nothing between them
        if start != end:
            raise UserError(f"{path}: not a whole safetensors file: a tensor begins at {start}, one ends at {end}")
        end = stop
    if end != data:
        raise UserError(f"{path}: not a whole safetensors file: its tensors have {end} bytes, {data} follow its header")
    return found


def _place(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, counted from the end of the header."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{path}: not a whole safetensors file: {brief(name)} is {brief(entry)}")
    return offsets[0], offsets[1]


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


def _form(path: Path, name: str, entry: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and the shape that a header states of a tensor."""
    stated, shape = entry.get("dtype"), entry.get("shape")
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
