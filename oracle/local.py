"""What `localize` finds: the own error of each stage of each layer, and the faults that these come to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jaxref import attention, ops
from jaxref.stages import STAGES, Key
from oracle.engine_tree import EngineTree
from oracle.trees import path_of

# Why the embedding is left out of a tree that does not say its tokens; the rest is replayed all the same.
NO_TOKENS = "the token ids are not known (--tokens or --prompt)"
# Why this sum is not checked where the layer before is not in the tree.
TELLS = "with attn_out it tells the hidden state before its layer, which the tree lacks"
# How much of the floor a scale may be that all rows share.
DRIFT = 0.125
# From so many products on it is no accident that all are wrong.
MANY, MOST = 8, 0.75


@dataclass(frozen=True)
class Local:
    """One stage of one layer. `local` and `accumulated` are relative L2; `limit` what `local` may be.

    `inherited` is the greatest accumulated error among its inputs; `drift` a scale that all rows share; `bad` of
    `values` are NaN (`nan` of them) or infinite here alone, and `tainted` because its inputs are; `wrong` describes a
    wrong choice of experts; `where` has the worst token and the worst head, channel or rank; `through` are stages that
    were computed since the tree lacks them, `past` those that were computed since their dumps are not what was used.
    """

    key: Key
    local: float
    floor: float
    limit: float
    accumulated: float | None = None
    inherited: float | None = None
    bad: int = 0
    nan: int = 0
    tainted: int = 0
    values: int = 0
    drift: float = 0.0
    wrong: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    through: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
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
    def not_finite(self) -> str:
        """How many values are NaN or infinite here alone, and the first token of them."""
        kind = "NaN" if self.nan == self.bad else "NaN or infinite" if self.nan else "infinite"
        first = f" (first at token {self.where['token']})" if "token" in self.where else ""
        return f"{self.bad} of {self.values} values {'is' if self.bad == 1 else 'are'} {kind}{first}"

    @property
    def amplification(self) -> float | None:
        """Accumulated error out over accumulated error in."""
        return self.accumulated / self.inherited if self.accumulated is not None and self.inherited else None


@dataclass(frozen=True)
class Fault:
    """The same stage wrong in some layers; `spared` are those where it was replayed and is right.

    `tainted` are those where it is as its inputs are, and they have values that are not finite.
    """

    stage: str
    layers: tuple[int | None, ...]
    spared: tuple[int | None, ...]
    worst: Local
    tainted: tuple[int | None, ...] = ()

    @property
    def count(self) -> int:
        """In how many layers it was replayed."""
        return len(self.layers) + len(self.spared) + len(self.tainted)


@dataclass(frozen=True)
class Misread:
    """A stage whose dump is not what `users` were computed from; `error` is the greatest that these have."""

    stage: str
    users: tuple[str, ...]
    error: float

    @property
    def words(self) -> str:
        """For a person."""
        few = [*self.users] if len(self.users) < 4 else [*self.users[:2], f"{len(self.users) - 2} others"]
        names = " and ".join(filter(None, (", ".join(few[:-1]), few[-1])))
        verb = "is" if len(few) == 1 else "are"
        return (
            f"the dump of {self.stage} is not what {names} used ({names} {verb} right): dumped after it was changed in"
            " place, or at another point?"
        )


def other_weights(rows: list[Local]) -> list[str]:
    """A note where nearly all products with weights are wrong, and nothing that reads none: they are other weights."""
    products = [row.faulty for row in rows if STAGES[row.key[1]].function in (ops.linear, attention.qkv_matmul)]
    others = [row.faulty for row in rows if not STAGES[row.key[1]].params]
    if len(products) < MANY or sum(products) < MOST * len(products) or not others or any(others):
        return []
    return [
        "nearly all products with weights are wrong, and every stage that reads none is right: the engine's weights are"
        " not MODEL's, but those of another file, or the same in fewer bits, in another order or unpacked wrongly; give"
        " what the engine reads, a .gguf too"
    ]


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
                spared = tuple(row.key[0] for row in rows if not row.faulty and not row.tainted)
                tainted = tuple(row.key[0] for row in rows if not row.faulty and row.tainted)
                found.append(Fault(stage, tuple(row.key[0] for row in bad), spared, worst, tainted))
        first = {row.key: place for place, row in enumerate(self.locals)}
        return sorted(found, key=lambda fault: first[fault.layers[0], fault.stage])

    def misread(self, row: Local) -> Misread | None:
        """What is wrong with the dump of a faulty stage where others are right on what it should be."""
        name = path_of(row.key)
        users = [other for other in self.locals if name in other.past]
        if not users:
            return None
        return Misread(row.key[1], tuple(dict.fromkeys(u.key[1] for u in users)), max(u.local for u in users))

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
