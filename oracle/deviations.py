"""How far a stage is from what it should be, and where: over what is comparable and finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

from jaxref.stages import STAGES

# How often rows that are only rounded may look as if they shared a scale.
CHANCE = 1e-5


def visible(stage: str, x: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """What is comparable: of the raw scores the causal triangle."""
    if stage != "attn_scores":
        return np.ones(x.shape, bool)
    return np.broadcast_to(np.arange(x.shape[-1]) <= np.asarray(at)[:, None], x.shape)


def distance(stage: str, test: np.ndarray, exact: np.ndarray, at: tuple[int, ...]) -> float:
    """Relative L2 over what is comparable and finite in both; infinite for other shapes."""
    if test.shape != exact.shape:
        return math.inf
    return relative(test, exact, np.isfinite(test) & np.isfinite(exact) & visible(stage, exact, at))


def relative(test: np.ndarray, exact: np.ndarray, keep: np.ndarray) -> float:
    """Relative L2 of two arrays of one shape over what is kept [of their shape]."""
    with np.errstate(all="ignore"):
        difference = test - exact
        if not keep.all():
            difference, exact = np.where(keep, difference, 0.0), np.where(keep, exact, 0.0)
        off, size = (math.sqrt(np.vdot(x, x)) for x in (difference, exact))
    return off / size if size else (math.inf if off else 0.0)


def drift(test: np.ndarray, exact: np.ndarray) -> float:
    """The scale between rows, less one: a mean over rows, in which the rounding of single values averages out."""
    rows = _scales(test, exact)
    # Few values do not average it out.
    return float(rows.mean()) if len(rows) and test.size >= 1024 else 0.0


def shared(test: np.ndarray, exact: np.ndarray) -> float:
    """`drift` where the rows agree on it, and zero where their rounding alone makes such a mean (Student's t)."""
    rows = _scales(test, exact)
    if len(rows) < 2:
        return 0.0
    chance = stdtrit(len(rows) - 1, 1 - CHANCE / 2) * rows.std(ddof=1) / math.sqrt(len(rows))
    return drift(test, exact) if abs(rows.mean()) > chance else 0.0


def _scales(test: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The factor between two rows that leaves least, less one, of each row that has one."""
    with np.errstate(all="ignore"):
        rows = (test * exact).sum(axis=1) / np.square(exact).sum(axis=1) - 1
    return rows[np.isfinite(rows)]


def worst(
    stage: str, test: np.ndarray, exact: np.ndarray, at: tuple[int, ...], dims: Any, limit: float
) -> dict[str, Any]:
    """Where the error lies: the worst token, head (or channel, or expert's rank), and how many are beyond the limit."""
    with np.errstate(all="ignore"):
        keep = np.isfinite(exact) & visible(stage, exact, at)
        d = np.where(keep, np.nan_to_num(test - exact, nan=np.inf, posinf=np.inf), 0.0)
        r = np.where(keep, exact, 0.0)
    axes = STAGES[stage].axes
    if axes[0] == "H":
        groups = {"token": (d.swapaxes(0, 1), r.swapaxes(0, 1)), "head": (d, r)}
    else:
        groups = {"token": (d, r)}
        width = dims["h"] if axes[-1] in ("Hh", "Kh", "(H+2K)h") else 1
        name = "head" if width > 1 else "rank" if len(axes) == 3 else "channel"
        parts = [x.swapaxes(0, 1) if len(axes) == 3 else x.reshape(len(x), -1, width).swapaxes(0, 1) for x in (d, r)]
        groups[name] = (parts[0], parts[1])
    found: dict[str, Any] = {}
    for name, (x, y) in groups.items():
        errors = _group_errors(x, y)
        place = int(errors.argmax())
        found[name] = at[place] if name == "token" else place
        found[f"{name}_rel_l2"] = float(errors[place])
        wrong = errors > max(limit, errors[place] / 100) if np.isfinite(errors[place]) else np.isinf(errors)
        found[f"{name}s_wrong"] = max(1, int(wrong.sum()))
        found[f"{name}s"] = len(errors)
    return found


def _group_errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        flat = [np.linalg.norm(v.reshape(len(v), -1), axis=1) for v in (x, y)]
        return np.nan_to_num(
            flat[0] / np.maximum(flat[1], 1e-3 * np.linalg.norm(y) / math.sqrt(len(y)) + 1e-300),
            nan=np.inf,
            posinf=np.inf,
        )
