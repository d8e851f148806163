"""The header of a GGUF file: its metadata, and where each tensor lies; every length is held against the file's size.

The `gguf` package can read one too, but makes NumPy objects of every token: 7.9 s for a vocabulary of 151,936.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from weights.errors import brief

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors in bytes, where the metadata states none
MAX_AXES = 4

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its shape as NumPy has it, row-major, how it is stored, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes it takes in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


@dataclass(frozen=True)
class Header:
    """What stands before the tensors, and how many bytes it takes."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    length: int


def read_header(data: mmap.mmap) -> Header:
    """Read the header of a mapped file. Raises `ValueError`, in one line, for anything but a whole GGUF file."""
    cursor = _Cursor(data)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version:#x} is not supported (only 2 and 3, little-endian)")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {brief(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    stored: dict[str, Stored] = {}
    for _ in range(tensors):
        name = cursor.string()
        if name in stored:
            raise ValueError(f"the tensor {brief(name)} is there twice")
        stored[name] = _stored(cursor, name)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {brief(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    placed = {name: Stored(t.shape, t.kind, start + t.offset) for name, t in stored.items()}
    _check_places(placed, len(data))
    return Header(metadata, placed, cursor.at)


def _check_places(tensors: dict[str, Stored], size: int) -> None:
    """Each tensor lies in the file, and on no other: so all of them together are no larger than it."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f"the tensors {brief(before)} and {brief(name)} overlap")
        end, before = tensor.offset + tensor.nbytes, name
        if end > size:
            raise ValueError(f"it ends inside {brief(name)}: truncated?")


def _stored(cursor: _Cursor, name: str) -> Stored:
    """One tensor's entry, its offset still counted from the first tensor."""
    axes = cursor.number("I")
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(f"the tensor {brief(name)} has {axes} axes")
    # The fastest axis comes first in the file, and last in NumPy.
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    if 0 in shape:
        raise ValueError(f"the tensor {brief(name)} is empty: {list(shape)}")
    kind = GGMLQuantizationType(cursor.number("I"))
    if shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"a row of {brief(name)} holds {shape[-1]} values, no whole blocks of {kind.name}")
    return Stored(shape, kind, cursor.number("Q"))


class _Cursor:
    """A place in the file that moves on with each reading."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """The next bytes. Raises `ValueError` where there are fewer."""
        if size > len(self._data) - self.at:
            raise ValueError("it ends inside its header: truncated?")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        """The next number, by its letter of the `struct` module."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """A length and so many bytes of UTF-8."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value of one of GGUF's types; strings as a list, numbers as an `array` of the file's bytes."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        return self.number(_SCALARS[GGUFValueType(kind)])

    def _array(self) -> list[str] | array[Any]:
        kind, count = GGUFValueType(self.number("I")), self.number("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("an array of arrays is not supported")
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        # Not a list: Python's numbers take up to 20 times the file's bytes.
        found = array(_SCALARS[kind].replace("?", "B"))
        found.frombytes(self.take(count * found.itemsize))
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def _strings(self, count: int) -> list[str]:
        # A vocabulary and its merges are 300,000 strings: this loop is what opening a file takes.
        data, at, found = self._data, self.at, list[str]()
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                found.append(str(data[start:at], "utf-8"))
        except (struct.error, OverflowError):
            raise ValueError("it ends inside its header: truncated?") from None
        self.at = at
        self.take(0)
        return found
