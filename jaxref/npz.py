"""Arrays by name in one file, as `numpy.savez` writes them: a zip whose members are `.npy` files, not compressed.

Where its members lie is read by `zipfile`; their numbers are read where they lie, so that no tensor is loaded whole.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxref.npy import LONGEST_HEADER, read_header
from weights import UserError
from weights.errors import brief, plain
from weights.extent import Extent
from weights.watched import Version, begun

# What precedes each member: its mark, its compression, the lengths of its name and of what follows that.
_LOCAL = struct.Struct("<4s4xH16xHH")
_MARK = b"PK\x03\x04"
# Flags: a name in UTF-8, and those that change nothing. Others are of members that are encrypted or patched.
_UTF8, _HARMLESS = 0x800, 0x80E
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OverflowError, struct.error, OSError)


def open_npz(
    path: Path, version: Version | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Extent]:
    """All arrays of a `.npz` file by their names, each in its own shape and dtype, read when it is asked for.

    Those whose names are not `wanted` may be of any kind, and are the bytes of their member. Raises `UserError` where
    the file is missing, is no whole zip, is compressed, or is no longer of `version`; at each reading where it has
    changed. The checksums in it are not looked at: for them all of it would have to be read.
    """
    file, mark = begun(path, version, len(_MARK))
    if mark != _MARK:
        raise UserError(f"{path}: not a whole .npz file: it does not begin like one")
    with file.opened() as opened:
        found: dict[str, Extent] = {}
        for info, start in _members(path, opened):
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise UserError(f"{path}: two arrays in it are called {brief(name)}")
            member = Extent(file, start, np.dtype(np.uint8), (info.file_size,))
            found[name] = _array(Path(f"{path}/{info.filename}"), opened, member) if wanted(name) else member
    return found


def _members(path: Path, opened: int) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """What lies in the zip and where its bytes begin, in their order in the file."""
    try:
        with os.fdopen(os.dup(opened), "rb") as stream, zipfile.ZipFile(stream) as archive:
            listed = [info for info in archive.infolist() if not info.filename.endswith("/")]
    except _BROKEN as error:
        raise UserError(f"{path}: not a whole .npz file: {plain(error)}") from None
    end, size = 0, os.fstat(opened).st_size
    for info in sorted(listed, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~_HARMLESS:
            raise UserError(f"{path}: {brief(info.filename)} is not stored as it is; save it with numpy.savez")
        start = _begins(opened, info) if end <= info.header_offset < size else None
        if start is None or info.file_size != info.compress_size or start + info.file_size > size:
            raise UserError(f"{path}: not a whole .npz file: {brief(info.filename)} is not where it is said to be")
        end = start + info.file_size
        yield info, start


def _begins(opened: int, info: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin: after a head of its own. None where that is another member's."""
    head = os.pread(opened, _LOCAL.size, info.header_offset)
    if len(head) < _LOCAL.size:
        return None
    mark, compression, length, more = _LOCAL.unpack(head)
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437", "replace")
    called = os.pread(opened, length, info.header_offset + _LOCAL.size)
    same = (mark, compression, called) == (_MARK, zipfile.ZIP_STORED, name)
    return info.header_offset + _LOCAL.size + length + more if same else None


def _array(name: Path, opened: int, member: Extent) -> Extent:
    """The array of a member that is a whole `.npy`."""
    head = os.pread(opened, min(LONGEST_HEADER, member.size), member.offset)
    start, dtype, shape = read_header(name, head)
    found = Extent(member.file, member.offset + start, dtype, shape or (1,))
    if start + found.size * dtype.itemsize != member.size:
        raise UserError(f"{name}: {member.size} bytes, but its header says {list(shape)} {dtype}")
    return found
