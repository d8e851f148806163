"""What a page shows, whoever made it: a map of cells, lines over the stages, pictures, tables and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxref.stages import STAGES, Key
from oracle.trees import path_of

STATUSES = ("agree", "tie", "diverge", "layout", "missing")
LEVELS = 11  # shades of the map: 0 for a value of 0.1 and more, 9 for the ninth decimal, 10 for equal


@dataclass(frozen=True)
class Cell:
    """One stage of one layer. `value` (0: equal, None: not known) is its shade, `mark` what stands in it.

    `status` is one of `STATUSES`; `details` are the lines that a click shows, by name.
    """

    key: Key
    value: float | None
    mark: str
    status: str
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> int | None:
        """Its shade, 0 (far off) to 10 (equal)."""
        if self.value is None:
            return None
        if not self.value > 0:
            return 10 if self.value == 0 else 0  # a NaN is far off
        return min(9, max(0, math.floor(-math.log10(self.value)))) if math.isfinite(self.value) else 0

    @property
    def title(self) -> str:
        """What a pointer above it says."""
        value = "" if self.value is None else ", equal" if self.value == 0 else f", {self.value:.3g}"
        return f"{path_of(self.key)}: {self.status}{value}"


@dataclass(frozen=True)
class Series:
    """A line over the stages. `kind`: "test", "hf", "limit" or "floor"; `marked` points are crossed."""

    name: str
    points: Mapping[Key, float]
    kind: str = "test"
    marked: frozenset[Key] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A drawing as SVG, in the colours of `palette.LIGHT`; `narrow` is another one for a phone."""

    title: str
    caption: str
    svg: str
    narrow: str | None = None


@dataclass(frozen=True)
class Listing:
    """A table of plain words."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Side:
    """One tree: its role, where it is, in a few words what it is, and its manifest."""

    role: str
    folder: str
    words: str
    manifest: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sheet:
    """A page. `verdict` is a few words, `status` the one of `STATUSES` that it has; `start` the cell shown at first.

    `marks` says what the marks in the map mean; `facts` stand beside the verdict, `findings` are sentences.
    """

    title: str
    verdict: str
    status: str
    sentence: str
    cells: Sequence[Cell]
    marks: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    lines: Sequence[Series] = ()
    pictures: Sequence[Picture] = ()
    listings: Sequence[Listing] = ()
    findings: Sequence[str] = ()
    trees: Sequence[Side] = ()
    start: Key | None = None

    @property
    def stages(self) -> list[str]:
        """The columns of the map, in computation order."""
        there = {cell.key[1] for cell in self.cells}
        return [name for name in STAGES if name in there]

    @property
    def layers(self) -> list[int | None]:
        """The rows of the map, the whole model last."""
        there = {cell.key[0] for cell in self.cells}
        return sorted(there, key=lambda layer: (layer is None, layer or 0))

    @property
    def shown(self) -> Cell:
        """The cell whose details are there at first."""
        return next((cell for cell in self.cells if cell.key == self.start), self.cells[0])
