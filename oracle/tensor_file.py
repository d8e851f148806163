"""One tensor of a tree: a file opened lazily, and what a file that is none seems to be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxref.aprt import open_aprt
from jaxref.loaded import PLACED
from weights import UserError
from weights.extent import Extent
from weights.files import regular
from weights.watched import Version

LAYER_FOLDER = re.compile(r"layer-([0-9]{1,9})")
_PAGE = "docs/engines.md"
READABLE = f".bin (APRT, see {_PAGE}), .npy and .safetensors are read"
# How files of others begin.
_OTHERS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip (.npz, .pt)",
    b"GGUF": "a GGUF checkpoint",
}


@dataclass(frozen=True)
class TensorFile:
    """One tensor of a tree."""

    path: Path
    values: Extent | np.ndarray  # [dim_product], in the dtype on disk; read when they are indexed


def open_tensor(path: Path, version: Version | None = None) -> tuple[int | None, TensorFile]:
    """An APRT, .npy or safetensors file: its layer (None: whole model) and its values.

    Raises `UserError` where it is missing, is no such file, is longer or shorter than its header says, or is no longer
    of `version`; and at each reading where it has changed.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file was expected")
    if path.suffix in PLACED:
        values = PLACED[path.suffix](path, version)
        return _layer_by_place(path), TensorFile(path, values.reshape(values.size))
    try:
        layer, values = open_aprt(path, version)
    except UserError as error:
        raise UserError(f"{error}{_instead(path)}") from None
    return layer, TensorFile(path, values)


def _instead(path: Path) -> str:
    """What a file that is no APRT seems to be, and what would be right; nothing where that is not to be seen."""
    try:
        with regular(path).open("rb") as file:
            head = file.read(6)
            size = path.stat().st_size
    except (OSError, UserError):
        return ""
    if head[:4] == b"APRT" or not head:
        return ""
    for begin, kind in _OTHERS.items():
        if head.startswith(begin):
            return f"; it is {kind}, and {READABLE}"
    return "" if size % 4 else f"; bare float32 need the header of 12 bytes that {_PAGE} shows"


def _layer_by_place(path: Path) -> int | None:
    found = LAYER_FOLDER.fullmatch(path.absolute().parent.name)
    return int(found[1]) if found else None
