"""A stage's own error on its inputs beside what rounding makes of it: the rule by which every tree is judged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from oracle.case import Case
from oracle.deviations import distance, shared, visible
from oracle.floor import DRIFTING, MARGIN, noise
from oracle.local import Local


def judged(
    case: Case, engine: np.ndarray, exact: np.ndarray, emulated: np.ndarray, dims: Mapping[str, int], numerics: str
) -> Local:
    """An engine's rows of a stage beside the exact ones and those with its roundings, all of one shape."""
    stage, at = case.stage, case.positions
    # Stages that the tree lacks are computed exactly, and the engine rounded at each of them.
    floor = max(distance(stage, emulated, exact, at), noise(stage, max(at), dims)) * (1 + len(case.through))
    shown = visible(stage, exact, at)
    lost = ~np.isfinite(engine) & shown
    own = lost & np.isfinite(exact) & np.isfinite(emulated)
    return Local(
        case.key,
        distance(stage, engine, exact, at),
        floor,
        MARGIN * floor,
        bad=int(own.sum()),
        nan=int((own & np.isnan(engine)).sum()),
        tainted=int((lost & ~np.isfinite(exact)).sum()),
        values=int(shown.sum()),
        drift=shared(engine, emulated) if stage in DRIFTING and numerics == "float16" else 0.0,
        through=case.through,
    )
