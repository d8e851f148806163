"""Where a value lies in a stage, by the names of the axes: token, head, dim, expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxref.stage import QKV, Stage, axis_size

# What people call a column of an axis.
_WORDS = {"D": "dim", "F": "unit", "M": "unit", "V": "token id", "E": "expert", "A": "rank", "S": "key"}
_HEADS = {"Hh": "head", "Kh": "kv head"}


def column_names(axes: tuple[str, ...], column: int, dims: Mapping[str, int]) -> dict[str, int | str]:
    """A column of a row by the names of its axes: {"head": 5, "dim": 12}, of packed projections with their part."""
    found: dict[str, int | str] = {}
    for axis in reversed(axes):
        column, index = divmod(column, axis_size(axis, dims))
        if axis == QKV:
            head, dim = divmod(index, dims["h"])
            part, start = next(
                (name, start)
                for name, start in (("v", dims["H"] + dims["K"]), ("k", dims["H"]), ("q", 0))
                if head >= start
            )
            found = {"part": part, "head": head - start, "dim": dim} | found
        elif axis in _HEADS:
            head, dim = divmod(index, dims["h"])
            found = {_HEADS[axis]: head, "dim": dim} | found
        else:
            found = {_WORDS.get(axis, axis): index} | found
    return found


def in_words(coordinate: Mapping[str, Any] | None) -> str:
    """A coordinate as a person says it: token 3, head 5, dim 12."""
    words = dict(coordinate or {})
    if part := words.pop("part", None):
        words = {f"{part} head" if name == "head" else name: index for name, index in words.items()}
    return ", ".join(f"{name} {index}" for name, index in words.items())


def heads_of(stage: Stage, dims: Mapping[str, int]) -> int | None:
    """How many heads lie side by side in a row; None where a row has no heads."""
    if stage.axes[-1] == QKV:
        return dims["H"] + 2 * dims["K"]
    return {"Hh": dims["H"], "Kh": dims["K"]}.get(stage.axes[-1])
