"""What `localize` finds: the own error of each stage of each layer, and the faults that these come to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jaxref.stages import STAGES, Key
from oracle.engine_tree import EngineTree

# Why the embedding is left out of a tree that does not say its tokens; the rest is replayed all the same.
NO_TOKENS = "the token ids are not known (--tokens or --prompt)"
# How much of the floor a scale may be that all rows share.
DRIFT = 0.125


@dataclass(frozen=True)
class Local:
    """One stage of one layer. `local` and `accumulated` are relative L2; `limit` what `local` may be.

    `inherited` is the greatest accumulated error among its inputs; `drift` a scale that all rows share; `bad` counts
    values that are NaN or infinite here alone; `wrong` describes a wrong choice of experts; `where` has the worst token
    and the worst head, channel or rank.
    """

    key: Key
    local: float
    floor: float
    limit: float
    accumulated: float | None = None
    inherited: float | None = None
    bad: int = 0
    drift: float = 0.0
    wrong: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    through: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def faulty(self) -> bool:
        """Whether the stage itself is wrong."""
        return self.bad > 0 or self.wrong is not None or not self.local <= self.limit or self.drifting

    @property
    def drifting(self) -> bool:
        """Whether rows are scaled by less than rounding hides in one value, but all alike."""
        return abs(self.drift) > DRIFT * self.floor

    @property
    def amplification(self) -> float | None:
        """Accumulated error out over accumulated error in."""
        return self.accumulated / self.inherited if self.accumulated is not None and self.inherited else None


@dataclass(frozen=True)
class Fault:
    """The same stage wrong in some layers; `spared` are those where it was replayed and is right."""

    stage: str
    layers: tuple[int | None, ...]
    spared: tuple[int | None, ...]
    worst: Local


@dataclass
class Found:
    """What `localize` found, in computation order."""

    engine: EngineTree
    numerics: str
    locals: list[Local]
    unknown: dict[Key, str]
    notes: list[str]

    @property
    def faults(self) -> list[Fault]:
        """Stages that are wrong, each once, in computation order."""
        found = []
        for stage in STAGES:
            rows = [row for row in self.locals if row.key[1] == stage]
            bad = [row for row in rows if row.faulty]
            if bad:
                worst = max(bad, key=lambda row: (row.bad, row.local if math.isfinite(row.local) else math.inf))
                spared = tuple(row.key[0] for row in rows if not row.faulty)
                found.append(Fault(stage, tuple(row.key[0] for row in bad), spared, worst))
        first = {row.key: place for place, row in enumerate(self.locals)}
        return sorted(found, key=lambda fault: first[fault.layers[0], fault.stage])

    @property
    def verdict(self) -> str:
        """ "clean", "faulty" or "incomplete"."""
        if any(row.faulty for row in self.locals):
            return "faulty"
        return "incomplete" if any(reason != NO_TOKENS for reason in self.unknown.values()) else "clean"

    @property
    def exit_code(self) -> int:
        """0 clean, 1 faulty, 2 incomplete."""
        return {"clean": 0, "faulty": 1, "incomplete": 2}[self.verdict]
