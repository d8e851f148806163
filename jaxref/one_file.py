"""One file of all tensors by their names, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxref.npz import open_npz
from jaxref.safetensors_stages import open_all
from weights import UserError
from weights.extent import Extent
from weights.watched import Version

ONE_FILE = {".safetensors": open_all, ".npz": open_npz}


def open_one_file(
    path: Path, version: Version | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Extent]:
    """All tensors of a safetensors or `.npz` file by their names, each in its own shape and dtype, read when asked for.

    Those whose names are not `wanted` may be of any type and are their bytes. Raises `UserError` where the file is
    none of these, is missing, is not whole, or is no longer of `version`; at each reading where it has changed.
    """
    if path.suffix not in ONE_FILE:
        raise UserError(f"{path}: all tensors are read from one file, {' or '.join(ONE_FILE)}, by their names")
    return ONE_FILE[path.suffix](path, version, wanted)
