"""The one hypothesis that fits a faulty stage, where no other comes near: the rule by which a cause is named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from jaxref.stages import STAGES
from oracle.chain import Chain, Changes, Trial, merged
from oracle.deviations import distance
from oracle.hypotheses import HYPOTHESES
from oracle.local import DRIFT, Local

# A hypothesis must leave so many times less than what was wrong, and others so many times more than it.
GAIN, AHEAD = 4.0, 4.0
# Of one hypothesis' parameters, one that is no more than so much worse may be the rounder one.
ALIKE = 1.15
# Through missing stages an engine's roundings go as far from the truth as ours, or so many times: they are others.
OTHERWISE = 4.0
# So many are taken in pairs, the best ones first; fewer where each has to be computed on through missing stages.
PAIRED, PAIRED_THROUGH = 24, 12
# So many layers in which nothing explains a stage, or nothing in missing stages does: it is not tried in the next ones.
ENOUGH, ENOUGH_THROUGH = 4, 2
# Of two faults at once the correction of one leaves less than so much of what was wrong.
BETTER = 0.95


@dataclass(frozen=True)
class Scored:
    """A variant and what it leaves; `same` are names of others that come to the same computation here.

    `through`: it is in a stage that the tree lacks. Nobody has the roundings after that, and a limit of several floors
    would let pass what is merely like the cause: it must leave no more than the floor, or `OTHERWISE` times what the
    engine's roundings make of it on the way.
    """

    trial: Trial
    error: float
    through: bool = False
    place: int = 0  # among all that were tried: round parameters come before exact ones
    same: tuple[str, ...] = ()


@dataclass
class Memory:
    """What earlier layers had, by the stage that showed it: that is tried first, and nothing where nothing fitted."""

    named: dict[str, Scored] = field(default_factory=dict)
    in_vain: Counter[str] = field(default_factory=Counter)
    skipped: set[str] = field(default_factory=set)
    in_vain_through: Counter[str] = field(default_factory=Counter)
    skipped_through: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        """What was no longer tried."""
        words = "tried in the first {} faulty layers alone, and explained none"
        through = words.format(ENOUGH_THROUGH)
        notes = [f"{stage}: what is missing before it was {through}" for stage in sorted(self.skipped_through)]
        if self.skipped:
            stages = ", ".join(stage for stage in STAGES if stage in self.skipped)
            notes.append(f"{stages}: hypotheses were {words.format(ENOUGH)}")
        return notes


def best(chain: Chain, row: Local, memory: Memory) -> Scored | None:
    """The one hypothesis, or pair of them, that fits where no other comes near; `memory` is kept up.

    What is not finite is explained only by what gives no finite values there, and by no others; it tells nothing of
    what is wrong in layers where all is finite.
    """
    if row.bad:
        return _best(chain, replace(row, local=math.inf))
    stage = chain.bench.stage
    if (again := _again(chain, row, memory.named.get(stage))) is not None:
        return again
    if memory.in_vain[stage] >= ENOUGH:
        memory.skipped.add(stage)
        return None
    if chain.missing and memory.in_vain_through[stage] >= ENOUGH_THROUGH:
        memory.skipped_through.add(stage)
        chain.missing.clear()
    found = _best(chain, row)
    if found is not None:
        memory.named[stage] = found
    else:
        memory.in_vain[stage] += 1
        memory.in_vain_through[stage] += bool(chain.missing)
    return found


def _again(chain: Chain, row: Local, before: Scored | None) -> Scored | None:
    """What an earlier layer had, where it leaves nothing but rounding in this one too."""
    if before is None or "+" in before.trial.name:
        return None
    for trial in chain.trials(before.trial.name):
        if (trial.words, list(trial.changes)) == (before.trial.words, list(before.trial.changes)):
            found = Scored(trial, chain.error(trial.changes), _through(chain, trial), same=before.same)
            return found if _fits(chain, found, row) else None
    return None


def _best(chain: Chain, row: Local) -> Scored | None:
    scored = sorted(_scores(chain, row), key=lambda each: each.error)
    if row.local <= row.limit:  # what is wrong is a scale too small to be seen in one value
        left = [replace(each, error=chain.drift(each.trial.changes)) for each in scored if each.error <= row.limit]
        row = replace(row, local=abs(row.drift), limit=DRIFT * row.floor, floor=DRIFT * row.floor)
        return _winner(chain, sorted(left, key=lambda each: each.error), row)
    if (found := _winner(chain, scored, row)) is not None:
        return found
    if row.bad or any(_fits(chain, each, row) for each in scored):
        return None  # several fit, and none is named; of what is not finite no two are tried together
    return _winner(chain, sorted(_pairs(chain, scored, row), key=lambda each: each.error), row)


def _scores(chain: Chain, row: Local) -> Iterator[Scored]:
    for place, trial in enumerate(chain.trials()):
        error = chain.error(trial.changes)
        # A number that was fitted to the engine's rows comes near them whatever they are.
        if not trial.fitted or error <= row.floor:
            yield Scored(trial, error, _through(chain, trial), place)


def _through(chain: Chain, trial: Trial) -> bool:
    return not trial.changes.keys().isdisjoint(chain.missing)


def _fits(chain: Chain, each: Scored, row: Local) -> bool:
    if not math.isfinite(each.error) or (each.error * GAIN > row.local and math.isfinite(row.local)):
        return False
    if not each.through:
        return each.error <= row.limit
    return each.error <= row.floor or each.error <= OTHERWISE * chain.rounding(each.trial.changes)


def _winner(chain: Chain, scored: list[Scored], row: Local) -> Scored | None:
    """The best fit, specific before generic, unless one by another name is nearly as good and not the same."""
    fitting = [each for each in scored if _fits(chain, each, row)]
    chosen = [each for each in fitting if not each.trial.generic] or fitting
    if not chosen:
        return None
    best, same = chosen[0], [chosen[0].trial.name]
    for other in scored:
        if other.error >= AHEAD * max(best.error, row.floor / 16):
            break
        if other.trial.name == best.trial.name or other.trial.generic > best.trial.generic:
            continue
        if not _equal(chain, best.trial, other.trial):
            return None
        same.append(other.trial.name)
    # Of names for one and the same computation the first one in the table is the plainest.
    name = min((each.trial.name for each in chosen if each.trial.name in same), key=_row)
    alike = [each for each in chosen if each.trial.name == name and _alike(each, best)]
    others = tuple(other for other in dict.fromkeys(same) if other != name)
    return replace(min(alike, key=lambda each: each.place), same=others)


def _row(name: str) -> int:
    """Where a hypothesis stands in the table; pairs come last."""
    return next((i for i, row in enumerate(HYPOTHESES) if row.name == name), len(HYPOTHESES))


def _alike(other: Scored, best: Scored) -> bool:
    """Whether it is as good, or fits with nearly the same number: what is left then is the engine's way to it."""
    ours, theirs = other.trial.parameter, best.trial.parameter
    near = isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-4)
    return near or other.error <= ALIKE * best.error


def _equal(chain: Chain, first: Trial, second: Trial) -> bool:
    a, b = chain.run(first.changes), chain.run(second.changes)
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-12))


def _pairs(chain: Chain, scored: list[Scored], row: Local) -> Iterator[Scored]:
    """Two hypotheses at once, where they switch different things and either alone leaves GAIN times more.

    One of the two must be better than nothing: that leaves few of the many pairs.
    """
    tried = [each for each in scored if not each.trial.generic][: PAIRED_THROUGH if chain.missing else PAIRED]
    for one, other in combinations(tried, 2):
        if min(one.error, other.error) > BETTER * row.local:
            break  # as of all that follow, which are worse
        first, second = one.trial, other.trial
        if first.name == second.name and _kinds(first) == [kinds - {"w"} for kinds in _kinds(second)]:
            continue
        changes = _together(first.changes, second.changes)
        if changes is None:
            continue
        words = f"{first.words}; and {second.words}"
        both = Trial(f"{first.name}+{second.name}", [first.parameter, second.parameter], words, changes)
        error = chain.error(changes)
        if error * GAIN <= min(one.error, other.error) and _matters(chain, first, row) and _matters(chain, second, row):
            yield Scored(both, error, _through(chain, both))


def _matters(chain: Chain, trial: Trial, row: Local) -> bool:
    """Whether a variant changes more than rounding does; one that does not may undo another's roundings by chance."""
    bench = chain.bench
    return distance(bench.stage, chain.run({}), chain.run(trial.changes), bench.case.positions) > row.limit


def _kinds(trial: Trial) -> list[set[str]]:
    return [set(switches) for switches in trial.changes.values()]


def _together(first: Changes, second: Changes) -> Changes | None:
    """Both at once; None where they set the same switch of the same stage."""
    found = dict(first)
    for stage, switches in second.items():
        both = merged(found.get(stage, {}), switches)
        if both is None:
            return None
        found[stage] = both
    return found
