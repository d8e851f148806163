"""One tensor in NumPy's own file, as `numpy.save` writes it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from weights import UserError
from weights.errors import brief, plain
from weights.extent import Extent
from weights.safetensors_file import DTYPES, MOST_AXES, WHOLE
from weights.watched import Version, begun

_KNOWN = {*DTYPES.values(), *WHOLE.values()}
LONGEST_HEADER = 1 << 14  # bytes; the package reads no longer one


def open_npy(path: Path, version: Version | None = None) -> Extent:
    """The array of a `.npy` file in its own shape and dtype, a scalar as [1], read when it is asked for.

    Raises `UserError` where the file is missing, no such file, holds no plain numbers row by row, is longer or shorter
    than its header says, or is no longer of `version`; and at each reading where it has changed.
    """
    file, head = begun(path, version, LONGEST_HEADER)
    start, dtype, shape = read_header(path, head)
    size, wanted = file.version.size, start + math.prod(shape) * dtype.itemsize
    if size != wanted:
        raise UserError(f"{path}: {size} bytes, but its header says {list(shape)} {dtype}, that is {wanted}")
    return Extent(file, start, dtype, shape or (1,))


def read_header(path: Path, head: bytes) -> tuple[int, np.dtype[Any], tuple[int, ...]]:
    """Where the numbers of a `.npy` begin, their dtype and their shape, by its first bytes; `path` is for messages.

    Raises `UserError` where it is none, or holds no plain numbers row by row.
    """
    try:
        text = io.BytesIO(head)
        if (written := npy.read_magic(text)) not in ((1, 0), (2, 0)):
            raise ValueError(f"version {written} of the format, which no plain array has")
        read = npy.read_array_header_1_0 if written == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read(text)
    except (ValueError, TypeError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a whole .npy file: {plain(error)}") from None
    if dtype not in _KNOWN:
        raise UserError(f"{path}: holds {brief(dtype.str)}, no little-endian floats or integers; save it as float32")
    if by_columns and sum(size > 1 for size in shape) > 1:
        raise UserError(f"{path}: lies column by column; save np.ascontiguousarray of it")
    if 0 in shape or len(shape) > MOST_AXES or not all(type(size) is int and size > 0 for size in shape):
        raise UserError(f"{path}: has shape {brief(list(shape))}: no values, or too many axes")
    return text.tell(), np.dtype(dtype), shape
