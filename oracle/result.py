"""What a compare finds: a comparison a stage, what was skipped, the first divergence, and whom to blame."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jaxref.stages import Key
from oracle.coordinates import in_words
from oracle.metrics import Figures
from oracle.trees import Tree, path_of
from oracle.verdict import Blame, Judgement, Rules
from weights import UserError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


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

    def __repr__(self) -> str:
        """One line; the figures of all stages would be thousands."""
        first = f", first at {path_of(self.first.key)}" if self.first else ""
        return f"Result({self.verdict}{first}: {len(self.comparisons)} stages compared, {len(self.missing)} missing)"

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, the map, and a sentence for a bug report."""
        from oracle.page.compare import sheet_of
        from oracle.page.render import fragment_of

        return fragment_of(sheet_of(self))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a stage of a layer; the yardstick's figures begin with `hf_`. Raises `UserError` without pandas."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_dataframe needs pandas, which is not installed: pip install pandas") from None
        from oracle.records import records

        rows = [record for record in records(self) if record.pop("record") == "comparison"]
        for row in rows:
            row["coordinate"] = in_words(row["coordinate"])
            row |= {f"hf_{name}": value for name, value in (row.pop("hf") or {}).items()}
        return pandas.DataFrame(rows).astype({"layer": "Int64"})

    def plot(self) -> Figure:
        """The staircase: relative L2 over all stages, and what is allowed. Raises `UserError` without matplotlib."""
        from oracle.page.compare import lines_of
        from oracle.plots import need_matplotlib, staircase

        need_matplotlib()
        from matplotlib import pyplot

        pyplot.close(pyplot.figure())  # a notebook shows figures only once pyplot has made one
        return staircase(lines_of(self))
