"""A faulty stage together with the stages just before it that its tree lacks: each of them may hold the fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxref.stages import STAGES, Key
from oracle.bench import Bench
from oracle.case import Case, narrowed
from oracle.deviations import distance, drift
from oracle.engine_tree import Value
from oracle.hypotheses import HYPOTHESES, Hypothesis, about
from oracle.replay import Replay
from oracle.tries import Try
from oracle.variants import Switches

Changes = dict[str, Switches]  # by stage
_ORDER = tuple(STAGES)


@dataclass(frozen=True)
class Trial:
    """One variant of a hypothesis, or of two: the switches of every stage that it changes, and how a person says it.

    One that is `fitted` to the engine's rows is believed only where it leaves no more than the floor, a `generic` one
    where no specific one fits.
    """

    name: str
    parameter: Any
    words: str
    changes: Changes
    generic: bool = False
    fitted: bool = False


class Chain:
    """Where hypotheses about one faulty stage are tried, and about the missing ones that it was computed through."""

    def __init__(self, replay: Replay, case: Case, engine: np.ndarray) -> None:
        self.replay, self.case = replay, case
        self.bench = Bench(replay, case, engine)

    @cached_property
    def missing(self) -> dict[str, Bench]:
        """By stage, in computation order, with the right rows in place of the engine's, which nobody has."""
        found = {}
        for key in self.replay.lacking(self.case.key):
            case = self.replay.case(key)
            if isinstance(case, Case) and about(key[1]):
                found[key[1]] = Bench(self.replay, case, self.replay.exact(case), shown=False, seen=self.bench.seen)
        return found

    def trials(self, known: str | None = None) -> Iterator[Trial]:
        """Everything that could be the cause: of the stage itself, of each that is missing, and of several at once.

        `known`: this hypothesis alone.
        """
        own, benches = self.bench.stage, {self.bench.stage: self.bench, **self.missing}
        for stage, bench in benches.items():
            for row in about(stage):
                if known in (None, row.name):
                    yield from (_trial(row, {stage: tried}, own) for tried in row.tries(bench))
        for row in HYPOTHESES if self.missing else ():
            if known in (None, row.name):
                for stages in _groups([stage for stage in benches if stage in row.stages]):
                    yield from self._at_once(row, {stage: benches[stage] for stage in stages})

    def _at_once(self, row: Hypothesis, benches: dict[str, Bench]) -> Iterator[Trial]:
        """The variants of a row that several stages have in common."""
        tries = {stage: _by_what_they_share(row.tries(bench)) for stage, bench in benches.items()}
        for shared in next(iter(tries.values())):
            if all(shared in found for found in tries.values()):
                yield _trial(row, {stage: found[shared] for stage, found in tries.items()}, self.bench.stage)

    def run(self, changes: Changes, rounded: bool = False) -> np.ndarray:
        """The stage's rows as they follow where every stage is computed with its switches.

        `rounded`: the engine's roundings are made wherever a missing stage is read or stored.
        """
        look = self.replay.rounded if rounded else self.replay.case
        case, instead = self.case, dict[Key, Value]()
        for stage, switches in sorted(changes.items(), key=lambda change: _ORDER.index(change[0])):
            if stage == self.bench.stage:
                continue
            key, bench = (self.case.key[0], stage), self.missing[stage]
            if instead or rounded:
                changed = look(key, instead)
                assert isinstance(changed, Case)
                bench = Bench(self.replay, changed, bench.engine, shown=False)
            rows = bench.run(switches)
            instead[key] = Value(self._stored(rows) if rounded else rows, bench.case.positions)
        if instead:
            through = look(self.case.key, instead)
            assert isinstance(through, Case)
            case = narrowed(through, self.case.positions)
        bench = self.bench if case is self.case else Bench(self.replay, case, self.bench.engine)
        return bench.run(changes.get(self.bench.stage, {}))

    def rounding(self, changes: Changes) -> float:
        """How far the engine's roundings in missing stages bring it from that: relative L2."""
        with np.errstate(all="ignore"):
            exact, rounded = self.run(changes), self._stored(self.run(changes, rounded=True))
        return distance(self.bench.stage, rounded, exact, self.case.positions)

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        return rows.astype(self.replay.emulated.compute).astype(np.float64)

    def error(self, changes: Changes) -> float:
        """How far the engine is from that: relative L2; infinite where it cannot be."""
        return self.bench.apart(lambda: self.run(changes))

    def drift(self, changes: Changes) -> float:
        """The scale that is left between the engine's rows and that, less rounding's own."""
        try:
            return abs(drift(self.bench.engine, self.run(changes)) - self.bench.rounding_drift)
        except (TypeError, ValueError, IndexError, KeyError):
            return float("inf")


def _trial(row: Hypothesis, tries: dict[str, Try], own: str) -> Trial:
    """One row's variant at some stages; of others than the stage itself the words say which."""
    first = next(iter(tries.values()))
    words = first.words if list(tries) == [own] else f"in {' and '.join(tries)}: {first.words}"
    changes = {stage: tried.switches for stage, tried in tries.items()}
    return Trial(row.name, first.parameter, words, changes, row.generic, any(t.fitted for t in tries.values()))


def _groups(stages: list[str]) -> list[list[str]]:
    """The stages that may be wrong together: all, and those of one function, as the two head norms are."""
    kinds = {
        STAGES[stage].function: [s for s in stages if STAGES[s].function is STAGES[stage].function] for stage in stages
    }
    groups = [stages, *(kind for kind in kinds.values() if kind != stages)]
    return [group for group in groups if len(group) > 1]


def _by_what_they_share(tries: Iterable[Try]) -> dict[str, Try]:
    """Variants by their parameter, or by what joins them: the matrices of one other layer are one variant."""
    found: dict[str, Try] = {}
    for tried in tries:
        key = repr(tried.parameter if tried.together is None else tried.together)
        if key not in found:
            found[key] = tried
        elif tried.together is not None and (both := merged(found[key].switches, tried.switches)) is not None:
            found[key] = replace(found[key], switches=both)
    return found


def merged(first: Switches, second: Switches) -> Switches | None:
    """Both sets of switches of one stage; None where they set the same one."""
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
