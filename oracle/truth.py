"""The right forward pass beside an engine's replayed stages: what its errors come to in all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxref.model import decoder_layer
from jaxref.pieces import Pieces, Place, Routing
from jaxref.reader import Reader
from jaxref.stages import STAGES, Key, inputs_of
from oracle.case import Case, Whole
from oracle.deviations import distance
from oracle.engine_tree import Value
from oracle.replay import Replay
from oracle.runner import EXACT


class Truth:
    """Runs along with the layers of a `Replay`, where the tokens are known; `errors`: each stage's distance from it."""

    def __init__(self, replay: Replay, reader: Reader) -> None:
        self.replay, self.errors = replay, dict[Key, float]()
        tokens = replay.engine.tokens
        self.hidden: Any = None if tokens is None else reader.embed(tokens)  # [S, D] before the present layer

    def layer(self, layer: int, params: Any) -> dict[str, np.ndarray]:
        """Every stage of the layer that comes next, in float64; none where the tokens are not known."""
        if self.hidden is None:
            return {}
        count, found = self.replay.engine.count, dict[str, list[np.ndarray]]()
        experts = Routing(partial(_experts, self.replay, layer), np.arange(count))
        place = Place(self.replay.config, layer, EXACT)
        self.hidden = _collect(decoder_layer(params, self.hidden, jnp.arange(count), place, experts), found)
        return {
            stage: np.concatenate(parts, axis=1 if stage.startswith("attn_s") else 0) for stage, parts in found.items()
        }

    def final_norm(self, norm: Any) -> np.ndarray | None:
        """[S, D] after the last layer, once the replay is at the whole model."""
        if self.hidden is None:
            return None
        at = tuple(range(self.replay.engine.count))
        return self.replay.exact(Case((None, "final_norm"), (np.asarray(self.hidden),), at, Whole(norm=norm)))

    def before(self, key: Key, value: Value) -> float | None:
        """How far an engine's hidden state before the present layer is from the right one; relative L2."""
        if self.hidden is None:
            return None
        rows = np.asarray(self.hidden)[list(value.positions)]
        return self.errors.setdefault(key, distance(key[1], value.array, rows, value.positions))

    def accumulated(self, key: Key, engine: np.ndarray, rows: np.ndarray, at: tuple[int, ...]) -> float | None:
        """How far an engine's rows of a stage at some positions are from the right ones [all positions, or as many]."""
        if rows.shape != engine.shape:
            rows = np.take(rows, list(at), axis=STAGES[key[1]].row_axis)
        if rows.shape != engine.shape:
            return None
        return self.errors.setdefault(key, distance(key[1], engine, rows, at))

    def inherited(self, key: Key) -> float | None:
        """The greatest error of a stage's inputs."""
        upstream = inputs_of(STAGES[key[1]], self.replay.config, key[0])
        return max((self.errors[name] for name in upstream if name in self.errors), default=None)  # type: ignore[index]


def _experts(replay: Replay, layer: int, ids: list[int]) -> Iterator[Any]:
    return (replay.expert(layer, number) for number in ids)


def _collect(pieces: Pieces, found: dict[str, list[np.ndarray]]) -> Any:
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        found.setdefault(piece.stage, []).append(np.asarray(piece.value, np.float64))
