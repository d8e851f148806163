"""One stage ready to be replayed: its inputs, its parameters, and the positions they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct

from jaxref.stages import Key
from oracle.engine_tree import Value

# Inputs of which every position is needed, whatever rows are asked for: keys, and the packed row that holds values.
WHOLE = {("attn_scores", 1), ("attention", 1)}
INDICES = "moe_router_indices"


@dataclass(frozen=True)
class Unknown:
    """Why a stage cannot be replayed."""

    reason: str


@struct.dataclass
class Whole:
    """The parameters that are no layer's: rows of the embedding, the last norm, the head."""

    embed_tokens: Any = None
    norm: Any = None
    head: Any = None


@dataclass(frozen=True)
class Case:
    """One stage ready to be computed: its inputs in float64 at `positions`, and its parameters.

    Inputs are arrays in the contract's shape, `params` a `Layer` or `Whole`. Of an expert's stage, `experts` [rows, A]
    are the engine's own ids.
    """

    key: Key
    inputs: tuple[np.ndarray, ...]
    positions: tuple[int, ...]
    params: Any  # Layer or Params in float64
    experts: np.ndarray | None = None
    through: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """Its name."""
        return self.key[1]


def shared_positions(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of the first that the second has too."""
    if first == second:
        return first
    there = set(second)
    return tuple(position for position in first if position in there)


def rows_at(value: Value, positions: tuple[int, ...], stage: str) -> np.ndarray:
    """The rows of some positions; attention's maps count them on their second axis."""
    if value.positions == positions:
        return value.array
    place = {position: index for index, position in enumerate(value.positions)}
    axis = (
        1 if value.array.ndim == 3 and value.array.shape[1] == len(value.positions) and stage.startswith("att") else 0
    )
    return np.take(value.array, [place[p] for p in positions], axis=axis)


def narrowed(case: Case, at: tuple[int, ...]) -> Case:
    """The case at fewer positions."""
    if at == case.positions:
        return case
    place = [case.positions.index(p) for p in at]
    inputs = []
    for index, x in enumerate(case.inputs):
        rows = (case.stage, index) not in WHOLE and not (case.stage == "attn_softmax" and index == 2)
        axis = 1 if x.ndim == 3 and case.stage in ("attn_softmax", "attention") else 0
        inputs.append(np.take(x, place, axis=axis) if rows else x)
    experts = None if case.experts is None else case.experts[place]
    return Case(case.key, tuple(inputs), at, case.params, experts, case.through)
