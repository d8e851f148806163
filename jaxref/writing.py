"""Files that are whole or not there, in a folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weights import UserError


def temporary_of(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an `OSError` name this file: that of a write names none, and a temporary's name tells a person nothing."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(temporary_of(path))):
            error.filename = str(path)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    temporary = temporary_of(path)
    with naming(path):
        try:
            temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            with suppress(OSError):  # the fault that led here is the one to tell
                temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, other: Callable[[], str]) -> Iterator[None]:
    """Hold a folder's lock. Raises `UserError` where another has it; `other` says who that may be.

    It is `flock`'s, on the folder itself: nothing lies about, and it ends with the process, whatever ends that. On a
    network file system it holds for the processes of one machine alone.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, folder, other)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, other: Callable[[], str]) -> None:
    try:
        with naming(folder):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: {other()} is writing here; wait for its end or choose another --output") from None
