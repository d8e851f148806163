"""The one exception a person is meant to read, and how a value that a file may hold is put into its line."""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

MOST_LISTED, LONGEST = 50, 300


class UserError(Exception):
    """What was wrong, where, and what would be right, in one line; the command line turns it into exit 2."""


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_array(self, x: array[Any], level: int) -> str:  # named by reprlib
        return self.repr_list(list(x[: self.maxlist + 1]), level)


def brief(value: Any) -> str:
    """The `repr` of a value out of a file, cut short: what a file may hold has any length."""
    return _Brief().repr(value)


def plain(said: Any) -> str:
    """A name or another's message as it is, if it is one line of some length; else its `brief`."""
    text = str(said)
    return text if text.isprintable() and len(text) <= LONGEST else brief(text)


def printable(said: Any) -> str:
    r"""A name or a text with what a terminal obeys written as `\x1b` or `\n`; the rest of it stays as it is."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(said))


def listed(words: Iterable[Any], separator: str = ", ") -> str:
    """Words one after another; of very many the first, and how many more there are; odd ones as their `brief`."""
    found = words if isinstance(words, Sequence) else list(words)
    shown = separator.join(plain(word) for word in found[:MOST_LISTED])
    more = len(found) - MOST_LISTED
    return f"{shown}{separator}and {more} more" if more > 0 else shown
