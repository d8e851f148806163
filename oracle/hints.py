"""What can be said of an error that no hypothesis explains: where it is, and what it looks like."""

from __future__ import annotations

import numpy as np

from oracle.bench import Bench
from oracle.deviations import visible
from oracle.local import Local

HALF_MAX, HALF_TINY = 65504.0, 2.0**-14


def look(bench: Bench, row: Local) -> str:
    """One line: tokens, heads or channels, and the kind of the error."""
    if row.wrong:
        return row.wrong
    words = [_place(row)]
    if row.bad:
        return ", ".join(filter(None, (row.not_finite, *words)))
    exact = bench.run({})
    if exact.shape != bench.engine.shape:
        return f"its shape is {list(bench.engine.shape)}, not {list(exact.shape)}"
    keep = visible(bench.stage, exact, bench.case.positions) & np.isfinite(bench.engine)
    kind = _kind(bench.engine[keep], exact[keep])
    return ", ".join(filter(None, (kind, *words)))


def _place(row: Local) -> str:
    """The few tokens, heads or channels that are wrong."""
    found = []
    for name in ("token", "head", "channel", "rank"):
        wrong, count = row.where.get(f"{name}s_wrong"), row.where.get(f"{name}s")
        if wrong is None or count is None:
            continue
        found.append(f"{name} {row.where[name]} alone" if wrong == 1 < count else f"{wrong} of {count} {name}s")
    return "at " + ", ".join(found) if found else ""


def _kind(engine: np.ndarray, exact: np.ndarray) -> str:
    """A scale, an offset, clipping, flushing, a permutation, zeros, or noise."""
    wrong = np.abs(engine - exact) > 1e-3 * np.abs(exact) + 1e-6 * np.abs(exact).max(initial=0)
    if not wrong.any():
        return "small everywhere"
    e, x = engine[wrong], exact[wrong]
    if (e == 0).all():
        tiny = np.abs(x).max() < HALF_TINY
        return (
            "values below float16's smallest normal are flushed to zero"
            if tiny
            else "zeros where there should be values"
        )
    limit = np.abs(e).max()
    if (np.abs(np.abs(e) - limit) <= 1e-6 * limit).all() and (np.abs(x) >= limit * 0.999).all():
        return f"saturation at {limit:.6g}" + (" (float16's greatest)" if limit == HALF_MAX else "")
    with np.errstate(all="ignore"):
        ratio, offset = e / x, e - x
        if len(e) > 1 and np.std(ratio) < 1e-3 * abs(np.mean(ratio)):
            return f"a scale of {np.mean(ratio):.6g}"
        if len(e) > 1 and np.std(offset) < 1e-2 * abs(np.mean(offset)):
            return f"an offset of {np.mean(offset):.6g}"
    if len(e) > 8 and np.allclose(np.sort(engine), np.sort(exact), rtol=1e-3, atol=1e-6 * np.abs(exact).max()):
        return "the right values in another order"
    with np.errstate(all="ignore"):
        alike = np.corrcoef(engine, exact)[0, 1]
    words = f"correlation {alike:.4f}" if np.isfinite(alike) else "the same value everywhere"
    return f"no plain scale, offset or order: noise-like, {words}"
