"""Files that somebody else wrote: opened only where they are plain files, JSON taken only where it has one meaning.

A symbolic link is followed wherever it leads: a snapshot in the Hugging Face cache is made of links to `../../blobs`.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from weights.errors import UserError, brief

# Python reads a thousand levels and then fails wherever the value is printed; no file of ours has ten.
MOST_NESTED = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def regular(path: Path) -> Path:
    """The path of a plain file. Raises `UserError` for a folder, a pipe or a device, `OSError` where there is none.

    Opening a pipe would wait for its writer, and a device may never end.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; a file was expected")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a pipe or a device; a plain file was expected")
    return path


def read_json(path: Path) -> Any:
    """The value of a JSON file: UTF-8, finite numbers, whole characters, no key twice with two values.

    Raises `FileNotFoundError` where there is none, and `UserError` for anything that is not such a file.
    """
    try:
        return parse_json(regular(path).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {_reason(error)}") from None


def parse_json(data: bytes) -> Any:
    """The value of such a text. Raises `ValueError` for any other."""
    try:
        found = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_not_finite
        )
        if _deeper(found, MOST_NESTED):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"more than {MOST_NESTED} levels deep") from None
    if _SURROGATE.search(data):
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a character cannot be printed
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return error.reason if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError)) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {brief(key)} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text)} is no finite number")
    return value


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie more than so many levels deep."""
    level = [value]
    for _ in range(levels + 1):
        level = [outer for outer in level if isinstance(outer, (list, dict))]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return True
