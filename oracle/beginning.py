"""The hidden state that a layer began with, where the tree has nothing of the layer before to tell it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxref.stages import Key
from oracle.case import Unknown, narrowed, rows_at, shared_positions
from oracle.engine_tree import Value
from oracle.judge import judged
from oracle.replay import Replay
from oracle.trees import path_of

SUM, BRANCH, NORM = "post_attn_residual", "attn_out", "attn_norm"
# What a state is off by is a scale where so many times less is left beside it.
SCALE_GAIN = 4.0


@dataclass(frozen=True)
class Beginning:
    """The state that the sum after it tells, and the one that follows from the layers before, if they can be computed.

    `vouched`: the sum is right on the latter, so that both can be believed. Else the sum cannot be judged.
    """

    key: Key
    told: Value
    followed: Value | None
    vouched: bool


def beginning(replay: Replay, layer: int, numerics: str) -> Beginning | None:
    """What a layer began with, as its own residual tells it; None where the tree has the layer before, or it is unfit.

    A dump of one layer is to be replayed on the engine's own state, not on what that should have been. But the sum that
    tells it may itself be the fault: it is believed where it is right on what the layers before give, or else where the
    norm is right on what it tells. The norm does not see a scale, so a state that is off by one alone is not believed.
    """
    key = (layer - 1, "post_ffn_residual") if layer else (0, "embedding")
    told = _told(replay, key, layer)
    if told is None:
        return None
    value = replay.value(key)
    if isinstance(value, Unknown):
        return Beginning(key, told, None, False)
    if _right(replay, (layer, SUM), key, value, numerics):
        return Beginning(key, told, value, True)
    if not _right(replay, (layer, NORM), key, told, numerics) or _scaled(told, rows_at(value, told.positions, key[1])):
        return None
    return Beginning(key, told, value, False)


def _told(replay: Replay, key: Key, layer: int) -> Value | None:
    """The sum less its branch, where the state is not in the tree and nothing of the layer before is."""
    engine = replay.engine
    alone = engine.tokens is None if layer == 0 else all(other[0] != layer - 1 for other in engine.keys)
    total, branch = (engine.value((layer, name)) for name in (SUM, BRANCH))
    if key in engine.tree.files or not alone or total is None or branch is None:
        return None
    at = tuple(p for p in total.positions if p in branch.positions)
    if not at:
        return None
    state = rows_at(total, at, SUM) - rows_at(branch, at, BRANCH)
    return Value(state, at, (path_of(key),)) if np.isfinite(state).all() and np.abs(state).max(axis=1).all() else None


def _right(replay: Replay, key: Key, before: Key, state: Value, numerics: str) -> bool:
    """Whether the engine has a stage, and it is right on this hidden state."""
    case, own = replay.case(key, {before: state}), replay.engine.value(key)
    if isinstance(case, Unknown) or own is None:
        return False
    at = shared_positions(case.positions, own.positions)
    if not at:
        return False
    case, engine = narrowed(case, at), rows_at(own, at, key[1])
    exact, emulated = replay.exact(case), replay.emulate(case)
    return (
        engine.shape == exact.shape and not judged(case, engine, exact, emulated, replay.engine.dims, numerics).faulty
    )


def _scaled(told: Value, followed: np.ndarray) -> bool:
    """Whether what is told is a multiple of what follows from the layers before, row by row."""
    x, y = told.array, followed
    factor = (x * y).sum(axis=1, keepdims=True) / np.maximum(np.square(y).sum(axis=1, keepdims=True), 1e-300)
    return bool(np.linalg.norm(x - factor * y) * SCALE_GAIN < np.linalg.norm(x - y))
