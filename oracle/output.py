"""Files that a command leaves for others to read, a page or a report: whole or not there, and no other file lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxref.writing import temporary_of
from weights import UserError

_BEGINNING = 512  # bytes of a file that are looked at
# What a terminal obeys, XML forbids or UTF-8 cannot say: control characters, halves of characters, non-characters.
_UNFIT = re.compile("[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def legible(text: str) -> str:
    r"""A text that may hold the name of a folder, with what is no text in it written as `\x1b` or `\udcff`."""
    return _UNFIT.sub(lambda found: ascii(found[0])[1:-1], text)


def check_output(path: Path, kind: str, like: str, begins: re.Pattern[bytes]) -> None:
    """Raise `UserError` where a file of this kind, with a name `like` this, cannot be written or would replace another.

    An earlier one of the kind may be replaced: it is known by how it `begins`. So may an empty file.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; a file like {like} was expected")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.absolute().parent}: no such folder, so {path.name} cannot be written there")
        if path.exists() and not _replaceable(path, begins):
            raise UserError(f"{path}: is there already and is no {kind}, so it is not replaced; choose another name")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _replaceable(path: Path, begins: re.Pattern[bytes]) -> bool:
    if not path.is_file():  # a device or a pipe: a rename would put a file in its place
        return False
    with path.open("rb") as file:
        head = file.read(_BEGINNING)
    return not head or begins.match(head) is not None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the name under which to write a file; it is renamed at the end. Raises `UserError` where that fails."""
    temporary = temporary_of(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # the fault that led here is the one to tell
            temporary.unlink(missing_ok=True)
