"""What else an engine's tensor could be: blocks misread, transposed, rows in another order, another tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from oracle.blocks import PARTS, Blocks, Read
from oracle.tries import float_bits
from oracle.tries_packed import BLOCKS, ORDERS, reordered
from oracle.unpacking import misreadings
from oracle.weight import ROUNDINGS, Held, rounding

FEW = 4  # rows that most readings are refuted by
MOST_MOVED = 1 << 26  # numbers of a tensor whose rows are looked for in another order


@dataclass(frozen=True)
class Reading:
    """One of them, by the name that `explain` has for it. `read` gives the rows START..STOP as an engine has them."""

    hypothesis: str
    words: str
    read: Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """A reading that leaves nothing but this rounding (a key of `ROUNDINGS`)."""

    reading: Reading
    rounding: str


def explained(held: Held) -> list[Fit]:
    """The readings that account for every value, of those the ones with the least rounding; generic ones at last."""
    for table in (_specific, _generic):
        fits = [Fit(reading, left) for reading in table(held) if (left := left_by(held, reading.read)) is not None]
        if fits:
            strict = min(map(_place, fits))
            return [fit for fit in fits if _place(fit) == strict]
    return []


def _place(fit: Fit) -> int:
    return list(ROUNDINGS).index(fit.rounding)


def left_by(held: Held, read: Callable[[int, int], np.ndarray]) -> str | None:
    """The rounding that is left in all rows with a reading, None where more is."""
    found = "none"
    for most in (FEW, None):
        for start, stop in held.chunks(most):
            left = rounding(held.rows(start, stop), read(start, stop), found)
            if left is None:
                return None
            found = left
    return found


def _specific(held: Held) -> Iterator[Reading]:
    yield from _unpacked(held)
    if held.shape[0] > 1:
        yield from _other_order(held)
    stored = held.checkpoint.stored_as(held.name)
    if stored in ("bfloat16", "BF16", "float16", "F16"):
        half = stored in ("float16", "F16")
        other = "bfloat16" if half else "float16"
        yield Reading(
            "weight_dtype", f"its {stored} values are read as {other}", _then(held, partial(float_bits, half=half))
        )
    if "norm" in held.name:
        yield Reading("norm_one_plus_w", "it is 1 + w, as in Gemma", _then(held, lambda rows: rows + 1))
    yield from _neighbours(held)


def _then(held: Held, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: change(held.right(start, stop))


def _unpacked(held: Held) -> Iterator[Reading]:
    kind, width = held.checkpoint.stored_as(held.name), held.shape[1]
    if kind in PARTS:
        for row in misreadings(kind):
            yield Reading("weight_unpacked", f"blocks of {kind}: {row.words}", partial(_misread, held, kind, row.read))
    for block in (block for block in BLOCKS if width % block == 0):
        for order, said in ORDERS.items():
            words = f"blocks of {block} weights are unpacked wrongly: {said}"
            yield Reading("weight_nibbles", words, _then(held, partial(reordered, block=block, order=order)))


def _misread(held: Held, kind: str, read: Read, start: int, stop: int) -> np.ndarray:
    return read(Blocks.of(kind, held.checkpoint.packed(held.name, slice(start, stop))))


def _other_order(held: Held) -> Iterator[Reading]:
    count = held.shape[0]

    @cache
    def whole() -> np.ndarray:
        return held.right(0, count).T.reshape(held.shape)

    def transposed(start: int, stop: int) -> np.ndarray:
        return whole()[start:stop]

    if min(held.shape) > 1:
        yield Reading("weight_transposed", "it lies transposed, [in, out]", transposed)
    if re.search(r"\.[qk]_proj\.weight$", held.name):
        h = held.checkpoint.config.head_dim
        for said, shape in (("turns", (-1, 2, h // 2)), ("halves", (-1, h // 2, 2))):
            order = np.arange(count).reshape(*shape).swapaxes(1, 2).reshape(-1)
            words = f"the rows of each head lie in {said}, as in Llama's GGUF"
            yield Reading("weight_permuted", words, partial(_ordered, held, order))


def _ordered(held: Held, order: np.ndarray, start: int, stop: int) -> np.ndarray:
    rows = order[start:stop]
    low = int(rows.min())
    return held.right(low, int(rows.max()) + 1)[rows - low]


def _neighbours(held: Held) -> Iterator[Reading]:
    shape = held.checkpoint.shape(held.name)
    for name in held.checkpoint.tensor_names:
        if name != held.name and held.checkpoint.shape(name) == shape:
            yield Reading("weight_neighbour", f"it is {name}", partial(held.right, name=name))


def _generic(held: Held) -> Iterator[Reading]:
    found = held.values[:FEW].astype(np.float64)
    right = held.right(held.first, held.first + len(found))
    with np.errstate(all="ignore"):
        times = float(np.sum(found * right) / np.sum(right * right))
    if np.isfinite(times) and times != 1:
        words = f"all values are {times:.6g} times the checkpoint's" if times else "all values are 0"
        yield Reading("scaled", words, _then(held, lambda rows: rows * times))
    if held.whole and held.shape[0] > 1 and held.values.size <= MOST_MOVED and (order := _moved(held)) is not None:
        some = [f"row {i} is row {order[i]}" for i in np.flatnonzero(order != np.arange(len(order)))[:3]]
        yield Reading(
            "rows_moved", f"its rows stand in another order: {', '.join(some)}", partial(_ordered, held, order)
        )


def _moved(held: Held) -> np.ndarray | None:
    """For each row of the engine the checkpoint's that has the same values, None where one has no such row."""
    right = held.right(0, held.shape[0]).astype(np.float32)
    places = {row.tobytes(): place for place, row in enumerate(right)}
    order = [places.get(row.tobytes()) for row in held.values.astype(np.float32)]
    return None if None in order else np.array(order, np.intp)
