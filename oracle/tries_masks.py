"""Hypotheses about which keys a query sees, read off the engine's softmax where that is shown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ml_dtypes import finfo

from oracle.bench import Bench
from oracle.tries import Tries, Try

# How masked scores are told apart from the others, in engines that have no infinity there.
INSTEAD = (0.0, -1.0, -10.0, -100.0)
# Without the softmax: so many first keys, and chunks of so many, are tried.
FIRST, CHUNKS = (1, 2, 3, 4), tuple(2**n for n in range(2, 13))
# Where a document begins or a prefix ends can be anywhere: up to so many positions each is tried.
SHORT = 64
# Kernels take so many keys at a time.
BLOCKS = tuple(2**n for n in range(2, 10))
# float32 may take less than this for zero on its way.
TINY = 1e-30


def masked_as(bench: Bench) -> Iterator[Try]:
    """A number in place of minus infinity."""
    for value in INSTEAD:
        yield Try(value, {"masked": value}, f"masked scores are {value:g}, not minus infinity")


def pattern(kind: str) -> Tries:
    """One of `_patterns`: where the softmax is shown only what it shows, else those that engines have."""

    def tries(bench: Bench) -> Iterator[Try]:
        shown = _shown(bench) if bench.shown else None
        if bench.shown and (shown is None or (shown != shown[0]).any()):
            return  # it is right, or not the same in all heads
        for number, seen, words in _patterns(bench, kind):
            if shown is None or np.array_equal(seen, shown[0]):
                yield Try(number, {"seen": seen}, words)

    return tries


def unrescaled(bench: Bench) -> Iterator[Try]:
    """Blocks of keys, as flash attention takes them, of which earlier ones are not rescaled for a greater score."""
    kept = {"nothing": "neither sum nor output is", "sum": "the output is not", "output": "the sum is not"}
    for block in (block for block in BLOCKS if block < bench.x[2].shape[0]):
        for rescaled, words in kept.items():
            words = f"it runs over blocks of {block} keys, and {words} rescaled when a greater score comes"
            yield Try(f"{block} {rescaled}", {"block": block, "rescaled": rescaled}, words)


def other(bench: Bench) -> Iterator[Try]:
    """Any other mask, as the softmax shows it."""
    shown = _shown(bench) if bench.shown else None
    if shown is None:
        return
    right, alike = np.broadcast_to(_causal(bench), shown.shape), (shown == shown[0]).all()
    hidden, ahead = (int(each.sum()) for each in (right & ~shown, shown & ~right))
    head, query, key = (int(i) for i in np.argwhere(shown != right)[0])
    where = f"first query {bench.case.positions[query]}, key {key}" + ("" if alike else f", head {head}")
    words = f"{hidden} keys are hidden that should be seen, {ahead} seen that should be hidden: {where}"
    yield Try(None, {"seen": shown}, words, fitted=True)


def _shown(bench: Bench) -> np.ndarray | None:
    """The keys [H, S, T] to which the engine gives any weight; None where these are the right ones."""
    shown = bench.engine > 0
    right = _causal(bench)
    # A weight may be too small for the engine's numbers, and then nothing tells it from a hidden key.
    shown |= right & (bench.run({}) < max(TINY, 2 * float(finfo(bench.replay.emulated.compute).smallest_subnormal)))
    return None if (shown == right).all() or not np.isfinite(bench.engine).all() else shown


def _causal(bench: Bench) -> np.ndarray:
    back = bench.x[1][:, None] - bench.x[2][None, :]
    window = bench.settings["window"]
    return (back >= 0) & ((back < window) if window is not None else True)


def _patterns(bench: Bench, kind: str) -> Iterator[tuple[int, np.ndarray, str]]:
    """Masks of one kind [S, T], with the number that makes them and how a person says it."""
    queries, keys = bench.x[1][:, None], bench.x[2][None, :]
    right, count = _causal(bench), bench.x[2].shape[0]
    if kind == "hidden":
        for first in FIRST if not bench.shown else range(1, count):
            yield first, right & ((keys >= first) | (queries == keys)), f"nobody sees the first {first} keys"
    elif kind == "chunks":
        for size in CHUNKS if not bench.shown else range(2, count):
            words = f"a query sees its own chunk of {size} positions alone"
            yield size, right & (queries // size == keys // size), words
    elif kind == "tail":
        for block in (block for block in BLOCKS if 0 < count % block < count):
            words = f"nobody sees the last {count % block} keys, which fill no block of {block}"
            yield block, right & (keys < count - count % block), words
    elif not bench.shown and count > SHORT:
        return
    elif kind == "documents":
        for start in range(1, count):
            words = f"from position {start} on nothing before it is seen, as if another document began there"
            yield start, right & ((queries < start) | (keys >= start)), words
    elif kind == "prefix":
        for end in range(2, count + 1):
            yield end, right | (keys < end), f"all queries see the first {end} keys, as in a prefix model"
