"""Why a stage is wrong: hypotheses tried on the engine's own tensors; one is named only where nothing else fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from oracle import hints
from oracle.case import INDICES, Case
from oracle.chain import Chain
from oracle.local import Found, Local
from oracle.localize import localize
from oracle.replay import Replay
from oracle.routing import rule_of
from oracle.sources import Given
from oracle.winner import Memory, best
from weights import Checkpoint

# What is named where the stage is right and its dump is not. It is no hypothesis: it follows from the stages after it.
MISREAD = "dump_misread"


@dataclass(frozen=True)
class Explanation:
    """A hypothesis that brings the local error down to the floor; `residual` is what it leaves (relative L2).

    `same` are other hypotheses that come to the same computation here, `stages` those where it is: the faulty one, or
    some that the tree lacks and that it was computed through.
    """

    hypothesis: str
    parameter: Any
    text: str
    residual: float
    same: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cause:
    """What is known of one faulty stage in the layers that it explains alike."""

    stage: str
    layers: tuple[int | None, ...]
    explanation: Explanation | None
    hint: str


@dataclass
class Explained:
    """What `explain` found: the faults, and for each its causes in the order of the faults."""

    found: Found
    causes: list[Cause] = field(default_factory=list)


def explain(
    checkpoint: Checkpoint,
    tree: Given,
    tokens: Sequence[int] | None = None,
    *,
    progress: Callable[[int], None] = lambda layer: None,
    **options: Any,
) -> Explained:
    """`localize`, and for each faulty stage what explains it; with the options and the errors of `localize`."""
    causes: list[Cause] = []
    memory = Memory()

    def visit(replay: Replay, case: Case, row: Local, engine: np.ndarray) -> None:
        causes.append(_cause(replay, case, row, engine, memory))

    found = localize(checkpoint, tree, tokens, progress=progress, visit=visit, **options)
    found.notes.extend(memory.notes())
    order = [fault.stage for fault in found.faults]
    rows = {row.key: row for row in found.locals}
    merged = _merged([_misread(found, rows[cause.layers[0], cause.stage], cause) for cause in causes])
    return Explained(found, sorted(merged, key=lambda cause: order.index(cause.stage)))


def _cause(replay: Replay, case: Case, row: Local, engine: np.ndarray, memory: Memory) -> Cause:
    layers = (case.key[0],)
    if case.stage == INDICES:
        return _routed(replay, case, row, engine)
    chain = Chain(replay, case, engine)
    hint = hints.look(chain.bench, row)
    found = best(chain, row, memory)
    if found is None:
        return Cause(case.stage, layers, None, hint)
    trial = found.trial
    explanation = Explanation(trial.name, trial.parameter, trial.words, found.error, found.same, tuple(trial.changes))
    return Cause(case.stage, layers, explanation, hint)


def _misread(found: Found, row: Local, cause: Cause) -> Cause:
    """The cause, but where others are right on what the stage should be: then it is the dump that is wrong."""
    misread = found.misread(row)
    if misread is None:
        return cause
    return replace(cause, explanation=Explanation(MISREAD, list(misread.users), misread.words, misread.error))


def _routed(replay: Replay, case: Case, row: Local, engine: np.ndarray) -> Cause:
    count, wanted = engine.shape[1], replay.config.num_experts_per_tok
    explanation = None
    if count != wanted:
        words = f"{count} experts a token (num_experts_per_tok is {wanted})"
        explanation = Explanation("router_count", count, words, 0.0)
    elif (rule := rule_of(case, engine, replay.emulated.name)) is not None:
        name, words = rule
        explanation = Explanation("router_choice", name, f"it chooses {words}", 0.0)
    return Cause(case.stage, (case.key[0],), explanation, str(row.wrong))


def _merged(causes: list[Cause]) -> list[Cause]:
    """Layers with the same explanation together; its residual is the greatest."""
    groups: dict[tuple[str, str, str], list[Cause]] = {}
    for cause in causes:
        e = cause.explanation
        key = (cause.stage, e.hypothesis if e else "", _about(e.parameter) if e else "")
        groups.setdefault(key, []).append(cause)
    found = []
    for group in groups.values():
        layers = tuple(layer for cause in group for layer in cause.layers)
        first = max(group, key=lambda cause: cause.explanation.residual if cause.explanation else 0.0)
        found.append(Cause(first.stage, layers, first.explanation, group[0].hint))
    return found


def _about(parameter: Any) -> str:
    """A parameter by which layers go together: what was fitted to each differs in its last digits."""
    return f"{parameter:.3g}" if isinstance(parameter, float) else repr(parameter)
