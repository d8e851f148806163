"""Which of a checkpoint's tensors an engine's tensor holds: one, or several that lie one below the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from oracle.weight import hugging_faces
from weights import Checkpoint
from weights.extent import Extent
from weights.gguf_file import EVERY

Tensors = Mapping[str, Extent | np.ndarray]  # an engine's, by its names
Read = Callable[[slice], np.ndarray]
# Matrices (and biases) one below the other, by what engines call that.
FUSED = {
    ".qkv_proj.": (".q_proj.", ".k_proj.", ".v_proj."),
    ".mlp.gate_up_proj.": (".mlp.gate_proj.", ".mlp.up_proj."),
}
# The same of all experts in one [E, rows, columns], as transformers and vLLM have them.
STACKED = {
    ".experts.gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    ".experts.down_proj": ("down_proj.weight",),
    ".experts.w13_weight": ("gate_proj.weight", "up_proj.weight"),
    ".experts.w2_weight": ("down_proj.weight",),
}


@dataclass(frozen=True)
class Part:
    """One of the checkpoint's tensors in an engine's: how it is called, what it is, and how its values are read."""

    name: str
    theirs: str
    read: Callable[[], np.ndarray]


def held_names(checkpoint: Checkpoint) -> Callable[[str], bool]:
    """Whether a name is a tensor's of the checkpoint, or that of several in one."""
    known = set(checkpoint.tensor_names)

    def held(name: str) -> bool:
        theirs = hugging_faces(checkpoint, name)
        return theirs in known or bool(_stacked(theirs)) or bool(_fused(known, theirs))

    return held


def parts_of(checkpoint: Checkpoint, known: set[str], name: str, given: Tensors) -> Iterator[Part]:
    """The checkpoint's tensors in one of an engine's, by its name; `known` are all that the checkpoint has.

    What has not the rows of its parts is taken whole for the first of them, which it does not fit; an expert that the
    checkpoint lacks is a part that is not known.
    """
    theirs = hugging_faces(checkpoint, name)
    if theirs in known:
        yield Part(name, theirs, lambda: np.asarray(given[name]))
    elif every := _stacked(theirs):
        values = given[name]
        for expert in range(values.shape[0] if len(values.shape) == 3 else 0):
            parts = [part.replace(EVERY, f".{expert}.") for part in every]
            read = partial(_rows_of, values, expert)
            yield from _split(checkpoint, known, parts, f"{name}[{expert}]", values.shape[1], read)
    elif parts := _fused(known, theirs):
        values = given[name]
        yield from _split(checkpoint, known, parts, name, values.shape[0], values.__getitem__)


def _split(
    checkpoint: Checkpoint, known: set[str], parts: list[str], where: str, count: int, read: Read
) -> Iterator[Part]:
    """The parts of `count` rows, by the rows that the checkpoint has of each."""
    ends = [0, *np.cumsum([checkpoint.shape(part)[0] for part in parts if part in known]).tolist()]
    if len(ends) <= len(parts) or ends[-1] != count:
        yield Part(where, parts[0], partial(read, slice(0, count)))
        return
    for part, (start, end) in zip(parts, pairwise(ends), strict=True):
        yield Part(part, part, partial(read, slice(start, end)))


def _rows_of(values: Extent | np.ndarray, expert: int, rows: slice) -> np.ndarray:
    return values[expert, rows]


def _stacked(theirs: str) -> list[str]:
    """The tensors of each expert, with `EVERY` in place of its number, that lie in a stack of this name."""
    if EVERY in theirs:
        return [theirs]
    ends = (end for end in STACKED if theirs.endswith(end))
    return [theirs.removesuffix(end) + ".experts" + EVERY + part for end in ends for part in STACKED[end]]


def _fused(known: set[str], theirs: str) -> list[str]:
    """The tensors that lie one below the other in one of this name; none where it is not called so."""
    for fused, matrices in FUSED.items():
        parts = [theirs.replace(fused, matrix) for matrix in matrices]
        if known.issuperset(parts):
            return parts
    return []
