"""What the parts of the forward pass hand to each other: a stage's value, where a layer runs, and what came before it.

Dimension key: T positions so far, the rest is in `jaxref/stages.py`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.experts import ExpertSource
from jaxref.precision import Numerics
from weights import Config


class Piece(NamedTuple):
    """A stage's value, or its query rows from `row` on where it is made in blocks.

    `selected`: it holds the positions that are asked for and no others.
    """

    stage: str
    value: Array
    row: int = 0
    selected: bool = False


class Past(NamedTuple):
    """Keys [T, K·h] after RoPE and packed projections [T, (H+2K)h] of the positions so far, with room for more."""

    keys: Array
    packed: Array

    def extended(self, keys: Array, packed: Array, positions: Array) -> Past:
        """With the rows of `positions` filled in."""
        return Past(_filled(self.keys, keys, positions), _filled(self.packed, packed, positions))


@jax.jit
def _filled(rows: Array, new: Array, positions: Array) -> Array:
    return rows.at[positions].set(new)


class Routing(NamedTuple):
    """Where experts come from that are not in memory, and the positions whose insides are asked for."""

    source: ExpertSource
    keep: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a layer runs: the model's config, the layer's index, the precision."""

    config: Config
    layer: int
    numerics: Numerics

    def rope(self, heads: int, start: int) -> dict[str, Any]:
        """The settings of `attention.rope` for this model."""
        config = self.config
        return {
            "start": start,
            "heads": heads,
            "head_dim": config.head_dim,
            "theta": config.rope_theta,
            "scaling": config.rope_scaling,
            "numerics": self.numerics,
        }


Pieces = Generator[Piece, None, Array]  # what a part yields, and the array it hands on


def collect(pieces: Pieces) -> tuple[dict[str, Array], Array]:
    """Run a part to its end: its stages, whole, and what it hands on."""
    found: dict[str, list[Array]] = {}
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return {stage: join_blocks(blocks) for stage, blocks in found.items()}, end.value
        found.setdefault(piece.stage, []).append(piece.value)


def join_blocks(blocks: list[Array]) -> Array:
    """Blocks of query rows [H, rows, S] into one."""
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
