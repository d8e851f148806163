"""Which experts an engine should have chosen, given its own router's logits: right, a tie, a swap, or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxref.stages import Key
from oracle.local import Local

if TYPE_CHECKING:
    from oracle.case import Case
    from oracle.replay import Replay

# How far apart two logits may be, relative to the greatest of them, for either to be chosen: by the engine's numerics.
TIE = {"float32": 2.0**-18, "float16": 2.0**-9, "bfloat16": 2.0**-6, "q8": 2.0**-18}


def judge(key: Key, case: Case, chosen: np.ndarray, replay: Replay, numerics: str) -> Local:
    """The ids [rows, A] of an engine beside the largest of its logits [rows, E]."""
    logits = case.inputs[0]
    ids = np.asarray(chosen)
    count = replay.config.num_experts_per_tok
    if ids.shape[1:] != (count,):
        return Local(
            key, float("inf"), 0, 0, wrong=f"{ids.shape[1]} experts a token, not {count}", through=case.through
        )
    if not np.isfinite(ids).all() or (ids != np.round(ids)).any() or ids.min() < 0 or ids.max() >= logits.shape[1]:
        return Local(key, float("inf"), 0, 0, wrong="ids that are no experts", through=case.through)
    ids = ids.astype(int)
    if not np.isfinite(logits).all():
        return Local(key, 0.0, 0.0, 0.0, through=case.through, notes=("its logits are not finite",))
    best = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    tie = TIE[numerics] * np.abs(logits).max(axis=1, keepdims=True)
    own = np.take_along_axis(logits, ids, axis=1)
    sets_differ = np.sort(ids, axis=1) != np.sort(best, axis=1)
    smallest = np.take_along_axis(logits, best[:, -1:], axis=1)
    repeated = np.array([len(set(row)) < count for row in ids.tolist()])
    wrong = (own < smallest - tie).any(axis=1) | repeated
    disorder = (np.diff(own, axis=1) > tie).any(axis=1) & ~wrong
    notes = []
    if (ties := sets_differ.any(axis=1) & ~wrong).any():
        notes.append(f"near ties at {int(ties.sum())} tokens: another expert, as good")
    share = float(wrong.mean())
    words = None
    if wrong.any():
        token = int(np.flatnonzero(wrong)[0])
        words = (
            f"at {int(wrong.sum())} of {len(ids)} tokens the wrong experts, first at token {case.positions[token]}: "
        )
        words += f"{ids[token].tolist()}, its logits say {best[token].tolist()}"
    elif disorder.any():
        words = f"at {int(disorder.sum())} tokens the right experts in another order than by descending weight"
    return Local(key, share, 0.0, 0.0, wrong=words, through=case.through, notes=tuple(notes))
