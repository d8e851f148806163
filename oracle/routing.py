"""Which experts an engine should have chosen, given its own router's logits: right, a tie, a swap, or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxref.stages import Key
from oracle.local import Local
from oracle.router_rules import Rule, rules

if TYPE_CHECKING:
    from oracle.case import Case
    from oracle.replay import Replay

# How far apart two logits may be, relative to the greatest of them, for either to be chosen: by the engine's numerics.
TIE = {"float32": 2.0**-18, "float16": 2.0**-9, "bfloat16": 2.0**-6, "q8": 2.0**-18}


def judge(key: Key, case: Case, chosen: np.ndarray, replay: Replay, numerics: str) -> Local:
    """The ids [rows, A] of an engine beside the largest of its logits [rows, E]."""
    logits, count = case.inputs[0], replay.config.num_experts_per_tok
    if chosen.shape[1:] != (count,):
        words = f"{chosen.shape[1]} experts a token, not {count}"
        return Local(key, float("inf"), 0, 0, wrong=words, through=case.through)
    ids = whole_ids(chosen, logits.shape[1])
    if ids is None:
        return Local(key, float("inf"), 0, 0, wrong="ids that are no experts", through=case.through)
    if not np.isfinite(logits).all():
        return Local(key, 0.0, 0.0, 0.0, through=case.through, notes=("its logits are not finite",))
    right = Rule("", "", logits)
    wrong, disorder = right.misses(ids, tie_of(logits, numerics))
    best = right.chosen(count)
    notes = []
    if (ties := (np.sort(ids, axis=1) != np.sort(best, axis=1)).any(axis=1) & ~wrong).any():
        notes.append(f"near ties at {int(ties.sum())} tokens: another expert, as good")
    words = None
    if wrong.any():
        token = int(np.flatnonzero(wrong)[0])
        words = (
            f"at {int(wrong.sum())} of {len(ids)} tokens the wrong experts, first at token {case.positions[token]}: "
        )
        words += f"{ids[token].tolist()}, its logits say {best[token].tolist()}"
    elif disorder.any():
        words = f"at {int(disorder.sum())} tokens the right experts in another order than by descending weight"
    return Local(key, float(wrong.mean()), 0.0, 0.0, wrong=words, through=case.through, notes=tuple(notes))


def whole_ids(chosen: np.ndarray, experts: int) -> np.ndarray | None:
    """An engine's ids as integers; None where there are none, or some are no experts."""
    ids = np.asarray(chosen)
    if (
        not ids.size
        or not np.isfinite(ids).all()
        or (ids != np.round(ids)).any()
        or ids.min() < 0
        or ids.max() >= experts
    ):
        return None
    return ids.astype(int)


def tie_of(logits: np.ndarray, numerics: str) -> np.ndarray:
    """How far apart two logits of each row may be for either to be chosen [rows, 1]."""
    return TIE[numerics] * np.abs(logits).max(axis=1, keepdims=True)


def rule_of(case: Case, chosen: np.ndarray, numerics: str) -> tuple[str, str] | None:
    """By which of the known mistakes an engine chose these ids [rows, A]: its name and its words; None: by no one.

    Where several come to the same choice the first one's name, and the words of all.
    """
    logits = case.inputs[0]
    ids = whole_ids(chosen, logits.shape[1])
    if ids is None:
        return None
    found = [rule for rule in rules(logits, ids.shape[1]) if rule.fits(ids, tie_of(logits, numerics))]
    return (found[0].name, ", or ".join(rule.words for rule in found)) if found else None
