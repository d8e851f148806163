"""The pictures of a compare: the staircase, and the stage that is looked at closely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oracle import experts
from oracle.page.compare import focus_of
from oracle.page.differences import DECADES, Differences, differences
from oracle.page.pairs import Pairs
from oracle.page.sheet import Picture, Series
from oracle.plots import (
    NARROW,
    difference_map,
    histogram_of_differences,
    histogram_of_values,
    staircase,
    svg_of,
)
from oracle.result import Result
from oracle.trees import path_of

_LINES = {
    "limit": "Dashes: what is allowed.",
    "floor": "Dots: 1 ulp of the test's dtype; an error below it counts as that much.",
}


def staircase_of(lines: Sequence[Series]) -> Picture:
    """Lines over all stages, for a wide and for a narrow page."""
    wide, narrow = svg_of(staircase(lines), "wide"), svg_of(staircase(lines, NARROW), "narrow")
    there = {line.kind for line in lines}
    words = ["Relative L2 at every stage.", "Crosses: diverges." if any(line.marked for line in lines) else ""]
    words += [said for kind, said in _LINES.items() if kind in there]
    words.append("Equal tensors lie on the lower edge.")
    return Picture("Staircase", " ".join(filter(None, words)), wide, narrow)


def pictures_of(result: Result, pairs: Pairs) -> list[Picture]:
    """Maps and histograms of the first divergence, or of the worst stage where there is none."""
    focus = focus_of(result)
    if focus.key[1] == experts.INDICES:  # ids have no distance
        return []
    found = {role: pairs.pair(focus.key, role) for role in pairs.others}
    small = {role: differences(pair) for role, pair in found.items() if pair is not None}
    where = path_of(focus.key)
    pictures = [_map(where, role, one, _brightest(small)) for role, one in small.items() if one.cells.any()]
    values = svg_of(histogram_of_values(small), "values")
    pictures.append(Picture(f"{where}: values", "How often each value occurs, on every side.", values))
    if any(one.errors.any() for one in small.values()):
        errors = svg_of(histogram_of_differences(small, DECADES), "errors")
        pictures.append(Picture(f"{where}: differences", "How often a difference of each size occurs.", errors))
    return pictures


def _map(where: str, role: str, found: Differences, brightest: float) -> Picture:
    shape = f"{len(found.row_labels)} × {found.cells.shape[1]}"
    words = f"The greatest |{role} − reference| in each of {shape} fields, in units of the reference's rms."
    if np.isnan(found.cells).any():
        words += " White: not finite."
    return Picture(f"{where}: {role} − reference", words, svg_of(difference_map(found, brightest), f"map-{role}"))


def _brightest(found: dict[str, Differences]) -> float:
    """The greatest difference of all sides, so that their maps share their shades."""
    greatest = max(float(np.nanmax(one.cells, initial=0.0)) for one in found.values())
    return greatest or 1.0
