"""Hypotheses about sums that lack terms: a device's share without the others', columns after the last whole block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from oracle.bench import Bench
from oracle.tries import Try

# Shares of this many devices are told apart, and columns are dropped by kernels with blocks of these sizes.
SHARES, BLOCKS = 8, (16, 32, 64, 128, 256)
# A sum that lacks the rest of a row, or a share, is at least so wrong.
REST, SHARE = 0.02, 0.2
# So many positions tell which shares are there.
ROWS = 64


def partial_sum(bench: Bench) -> Iterator[Try]:
    """The product with some of its input's columns left out or counted several times: least squares tell which."""
    width = bench.x[0].shape[-1]
    if not np.isfinite(bench.engine).all() or (bench.shown and bench.seen < REST):
        return
    tried: set[int] = set()
    for block in BLOCKS:
        whole = width - width % block
        if 0 < whole < width and whole not in tried:
            tried.add(whole)
            times = (np.arange(width) < whole).astype(float)
            words = f"only the first {whole} of its {width} inputs are summed, the whole blocks of {block}"
            yield Try(whole, {"x": {0: bench.x[0] * times}}, words)
    for counts in _counts(bench) if width % SHARES == 0 else ():
        times = np.repeat(counts, width // SHARES)
        yield Try(counts, {"x": {0: bench.x[0] * times}}, _in_words(counts, width))


def _counts(bench: Bench) -> Iterator[list[int]]:
    """How often each eighth of the input is in the sum [8]: whole numbers, if any; unseen, a half or a quarter once."""
    if not bench.shown:
        for ways in (2, 4):
            yield from np.repeat(np.eye(ways, dtype=int), SHARES // ways, axis=1).tolist()
        return
    if bench.seen < SHARE:
        return
    x, width = bench.x[0], bench.x[0].shape[-1] // SHARES
    parts = []
    for share in range(SHARES):
        kept = np.zeros(x.shape[-1])
        kept[share * width : (share + 1) * width] = 1
        parts.append(bench.run({"x": {0: x * kept}})[:ROWS].ravel())
    rows = bench.engine[:ROWS].ravel()
    if parts[0].shape != rows.shape:
        return
    found = np.linalg.lstsq(np.stack(parts, axis=1), rows, rcond=None)[0]
    counts = [round(count) for count in found.tolist()]
    # As many times each is another fault's: a scale, or nothing but zeros.
    if np.abs(found - counts).max() < 0.01 and len(set(counts)) > 1:
        yield counts


def _in_words(counts: list[int], width: int) -> str:
    """Which columns are not summed once, run by run."""
    said, size, start = [], width // SHARES, 0
    for count, run in groupby(counts):
        end = start + len(list(run)) * size
        if count != 1:
            said.append(f"{start} to {end - 1} {f'{count} times' if count else 'not at all'}")
        start = end
    return f"of its {width} inputs it sums {', '.join(said)}, as without the sum over devices, or with it twice"
