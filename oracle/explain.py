"""Why a stage is wrong: hypotheses tried on the engine's own tensors; one is named only where nothing else fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from oracle import hints
from oracle.bench import Bench
from oracle.hypotheses import about
from oracle.local import DRIFT, Found, Local
from oracle.localize import localize
from oracle.replay import INDICES, Case, Replay
from oracle.tries import Try
from weights import Checkpoint

# A hypothesis must leave so many times less than what was wrong, and others so many times more than it.
GAIN, AHEAD = 4.0, 4.0
# What is named where the stage is right and its dump is not. It is no hypothesis: it follows from the stages after it.
MISREAD = "dump_misread"
# Of one hypothesis' parameters, one that is no more than so much worse may be the rounder one.
ALIKE = 1.15


@dataclass(frozen=True)
class Explanation:
    """A hypothesis that brings the local error down to the floor; `residual` is what it leaves (relative L2).

    `same` are other hypotheses that come to the same computation here.
    """

    hypothesis: str
    parameter: Any
    text: str
    residual: float
    same: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class _Scored:
    name: str
    tried: Try
    error: float
    generic: bool
    place: int = 0  # among all that were tried: round parameters come before exact ones
    same: tuple[str, ...] = ()


def explain(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokens: Sequence[int] | None = None,
    *,
    progress: Callable[[int], None] = lambda layer: None,
    **options: Any,
) -> Explained:
    """`localize`, and for each faulty stage what explains it; with the options and the errors of `localize`."""
    causes: list[Cause] = []

    def visit(replay: Replay, case: Case, row: Local, engine: np.ndarray) -> None:
        causes.append(_cause(replay, case, row, engine))

    found = localize(checkpoint, folder, tokens, progress=progress, visit=visit, **options)
    order = [fault.stage for fault in found.faults]
    rows = {row.key: row for row in found.locals}
    merged = _merged([_misread(found, rows[cause.layers[0], cause.stage], cause) for cause in causes])
    return Explained(found, sorted(merged, key=lambda cause: order.index(cause.stage)))


def _cause(replay: Replay, case: Case, row: Local, engine: np.ndarray) -> Cause:
    layers = (case.key[0],)
    if case.stage == INDICES:
        return _routed(replay, case, row, engine)
    bench = Bench(replay, case, engine)
    hint = hints.look(bench, row)
    if row.bad:
        return Cause(case.stage, layers, None, hint)
    best = _best(bench, row)
    if best is None:
        return Cause(case.stage, layers, None, hint)
    tried = best.tried
    return Cause(case.stage, layers, Explanation(best.name, tried.parameter, tried.words, best.error, best.same), hint)


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
    return Cause(case.stage, (case.key[0],), explanation, str(row.wrong))


def _best(bench: Bench, row: Local) -> _Scored | None:
    """The one hypothesis, or pair of them, that fits where no other comes near."""
    scored = sorted(_scores(bench, row), key=lambda each: each.error)
    if row.local <= row.limit:  # what is wrong is a scale too small to be seen in one value
        left = [replace(each, error=bench.drift(each.tried.switches)) for each in scored if each.error <= row.limit]
        row = replace(row, local=abs(row.drift), limit=DRIFT * row.floor, floor=DRIFT * row.floor)
        return _winner(bench, sorted(left, key=lambda each: each.error), row)
    if (found := _winner(bench, scored, row)) is not None:
        return found
    if any(_fits(each.error, row) for each in scored):
        return None  # several fit: none is named
    return _winner(bench, sorted(_pairs(bench, scored), key=lambda each: each.error), row)


def _scores(bench: Bench, row: Local) -> Iterator[_Scored]:
    everything = ((one, tried) for one in about(bench.stage) for tried in one.tries(bench))
    for place, (one, tried) in enumerate(everything):
        error = bench.error(tried.switches)
        # A number that was fitted to the engine's rows comes near them whatever they are.
        if not tried.fitted or error <= row.floor:
            yield _Scored(one.name, tried, error, one.generic, place)


def _fits(error: float, row: Local) -> bool:
    return error <= row.limit and (error * GAIN <= row.local or not math.isfinite(row.local))


def _winner(bench: Bench, scored: list[_Scored], row: Local) -> _Scored | None:
    """The best fit, specific before generic, unless one by another name is nearly as good and not the same."""
    fitting = [each for each in scored if _fits(each.error, row)]
    chosen = [each for each in fitting if not each.generic] or fitting
    if not chosen:
        return None
    best, same = chosen[0], []
    for other in scored:
        if other.error >= AHEAD * max(best.error, row.floor / 16):
            break
        if other.name == best.name or other.generic > best.generic:
            continue
        if not _equal(bench, best.tried, other.tried):
            return None
        same.append(other.name)
    alike = [each for each in chosen if each.name == best.name and _alike(each, best)]
    return replace(min(alike, key=lambda each: each.place), same=tuple(dict.fromkeys(same)))


def _alike(other: _Scored, best: _Scored) -> bool:
    """Whether it is as good, or fits with nearly the same number: what is left then is the engine's way to it."""
    ours, theirs = other.tried.parameter, best.tried.parameter
    near = isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-4)
    return near or other.error <= ALIKE * best.error


def _equal(bench: Bench, first: Try, second: Try) -> bool:
    a, b = bench.run(first.switches), bench.run(second.switches)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-12))


def _pairs(bench: Bench, scored: list[_Scored]) -> Iterator[_Scored]:
    """Two hypotheses at once: the best ones with each of the others, where they switch different things."""
    tried = [each for each in scored if not each.generic]
    for first, second in combinations(tried, 2):
        if first.name == second.name and first.tried.switches.keys() == second.tried.switches.keys() - {"w"}:
            continue
        switches = _together(first.tried.switches, second.tried.switches)
        if switches is None:
            continue
        words = f"{first.tried.words}; and {second.tried.words}"
        both = Try([first.tried.parameter, second.tried.parameter], switches, words)
        yield _Scored(f"{first.name}+{second.name}", both, bench.error(switches), False)


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """Both sets of switches; None where they set the same one."""
    found = dict(first)
    for name, value in second.items():
        if name in ("x", "w", "times") and isinstance(value, dict) and isinstance(found.get(name), dict):
            if found[name].keys() & value.keys():
                return None
            found[name] = found[name] | value
        elif name in found:
            return None
        else:
            found[name] = value
    return found


def _merged(causes: list[Cause]) -> list[Cause]:
    """Layers with the same explanation together; its residual is the greatest."""
    groups: dict[tuple[str, str, str], list[Cause]] = {}
    for cause in causes:
        e = cause.explanation
        key = (cause.stage, e.hypothesis if e else "", repr(e.parameter) if e else "")
        groups.setdefault(key, []).append(cause)
    found = []
    for group in groups.values():
        layers = tuple(layer for cause in group for layer in cause.layers)
        first = max(group, key=lambda cause: cause.explanation.residual if cause.explanation else 0.0)
        found.append(Cause(first.stage, layers, first.explanation, group[0].hint))
    return found
