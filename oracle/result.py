"""What a compare finds: a comparison a stage, what was skipped, the first divergence, and whom to blame."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxref.stages import Key
from oracle.metrics import Figures
from oracle.trees import Tree
from oracle.verdict import Blame, Judgement, Rules


@dataclass(frozen=True)
class Comparison:
    """One stage of one layer. `status` is "agree", "diverge", "layout", or "tie": off after a near-tie swap."""

    key: Key
    status: str
    judgement: Judgement
    test: Figures  # test against reference
    hf: Figures | None  # yardstick against reference
    coordinate: dict[str, Any] | None  # of the greatest difference, or of the first NaN
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it counts for agreement."""
        return self.status in ("agree", "tie")


@dataclass(frozen=True)
class Skip:
    """A stage that was not compared; `missing` ones make the result incomplete."""

    key: Key
    reason: str
    missing: bool


@dataclass
class Result:
    """What a compare found, in computation order."""

    trees: dict[str, Tree]  # "reference", "test", and perhaps "hf"
    rules: Rules
    comparisons: list[Comparison]
    skips: list[Skip]
    notes: list[str] = field(default_factory=list)
    last_good: Key | None = None
    worst: dict[str, Any] = field(default_factory=dict)  # the worst token and head of the first divergence
    blame: Blame = field(default_factory=lambda: Blame("none", "nobody: no divergence"))

    @cached_property
    def first(self) -> Comparison | None:
        """The first divergence."""
        return next((c for c in self.comparisons if not c.good), None)

    @property
    def missing(self) -> list[Skip]:
        """What should have been there."""
        return [skip for skip in self.skips if skip.missing]

    @property
    def verdict(self) -> str:
        """ "agree", "diverge" or "incomplete"."""
        return "diverge" if self.first else "incomplete" if self.missing else "agree"

    @property
    def exit_code(self) -> int:
        """0 agree, 1 diverge, 2 incomplete."""
        return {"agree": 0, "diverge": 1, "incomplete": 2}[self.verdict]
