"""One tensor of a checkpoint as an engine holds it: the same, the same but for rounding, or another, and which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property

import numpy as np

from weights import Checkpoint, UserError
from weights.errors import brief
from weights.gguf_file import EVERY, hugging_face_name

# Numbers that are compared at once: what is made of them on the way stays in a core's own cache.
AT_ONCE = 1 << 18
# How far from the checkpoint's value (times that value, times the greatest of its row) a value may be, each bound
# within the next. In float32 a block's scale, offset and minimum are applied in some order, each time with a rounding;
# an engine that holds half precision rounds what comes of that.
ROUNDINGS = {
    "none": (0.0, 0.0),
    "float32": (2.0**-22, 2.0**-21),
    "float16": (2.0**-10, 2.0**-21),
    "bfloat16": (2.0**-7, 2.0**-21),
}
SUBNORMAL = 2.0**-24  # the smallest float16


@dataclass(frozen=True)
class Held:
    """Rows of a tensor [rows, columns] as an engine has them, from row `first` on; a vector is one row."""

    checkpoint: Checkpoint
    name: str
    values: np.ndarray
    first: int = 0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the whole tensor in the checkpoint."""
        return matrix_shape(self.checkpoint.shape(self.name))

    @property
    def whole(self) -> bool:
        """Whether all rows are there."""
        return len(self.values) == self.shape[0]

    def right(self, start: int, stop: int, name: str | None = None) -> np.ndarray:
        """Rows of this tensor (or of another one of its shape) in the checkpoint [rows, columns], in float64."""
        return rows_of(self.checkpoint, name or self.name, start, stop)

    def chunks(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of the tensor's rows, to be compared one after another; at most `most` rows in all."""
        end = self.first + (len(self.values) if most is None else min(most, len(self.values)))
        step = max(1, AT_ONCE // self.shape[1])
        for start in range(self.first, end, step):
            yield start, min(start + step, end)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The engine's values of these rows of the tensor, in float64."""
        return self.values[start - self.first : stop - self.first].astype(np.float64)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor: a vector is one row, a stack of matrices one below the other."""
    return (1, shape[0]) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def rows_of(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a tensor as `matrix_shape` counts them, in float64."""
    if len(checkpoint.shape(name)) == 2:
        return checkpoint.tensor(name, start, stop).astype(np.float64)
    whole = checkpoint.tensor(name)
    return whole.reshape(matrix_shape(whole.shape))[start:stop].astype(np.float64)


def hugging_faces(checkpoint: Checkpoint, name: str) -> str:
    """A tensor's name in Hugging Face's spelling, of the head what it is made of; whether it is there or not."""
    theirs = hugging_face_name(name) or name
    return checkpoint.head_name if theirs == "lm_head.weight" else theirs


def tensor_named(checkpoint: Checkpoint, name: str) -> str:
    """The checkpoint's tensor of this name, Hugging Face's or GGUF's. Raises `UserError` with the nearest names."""
    known, theirs = checkpoint.tensor_names, hugging_faces(checkpoint, name)
    if theirs in known:
        return theirs
    if EVERY in theirs:
        one = theirs.replace(EVERY, ".0.")
        raise UserError(f"{brief(name)} is a stack of experts; name one of them, like {one}")
    near = get_close_matches(theirs, known, 3, 0.5) or known[:3]
    raise UserError(f"{checkpoint.name} has no tensor {brief(name)}; it has {', '.join(near)}, …")


def rounding(found: np.ndarray, right: np.ndarray, least: str = "none") -> str | None:
    """The strictest of `ROUNDINGS` that accounts for the difference of two arrays [rows, columns], None for no one.

    Stricter ones than `least` are not tried: other rows need it already.
    """
    tried = list(ROUNDINGS)[list(ROUNDINGS).index(least) :]
    return next((name for name in tried if not beyond(found, right, name).any()), None)


def beyond(found: np.ndarray, right: np.ndarray, allowed: str) -> np.ndarray:
    """Which values are further apart than a rounding makes them; NaN is like NaN alone."""
    of_value, of_row = ROUNDINGS[allowed]
    if allowed == "none":
        return ~_same(found, right)
    with np.errstate(all="ignore"):
        size = np.abs(right)
        greatest = np.fmax.reduce(size, axis=1, initial=0.0, keepdims=True)  # of what is a number
        bound = of_value * size + of_row * greatest
        if allowed in ("float16", "bfloat16"):
            bound += SUBNORMAL
        wrong = ~(np.abs(found - right) <= bound)
    return wrong & ~_same(found, right) if wrong.any() else wrong


def _same(found: np.ndarray, right: np.ndarray) -> np.ndarray:
    same = found == right
    return same if same.all() else same | (np.isnan(found) & np.isnan(right))


@dataclass
class Difference:
    """Figures over all rows that an engine has. `wrong` counts values that no rounding explains.

    `worst` is (row, column, the engine's, the checkpoint's) where they are furthest apart, `places` counts what is
    wrong by column.
    """

    count: int = 0
    wrong: int = 0
    wrong_rows: int = 0
    squares: float = 0.0
    reference: float = 0.0
    worst: tuple[int, int, float, float] | None = None
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    @property
    def relative_l2(self) -> float:
        """‖engine − checkpoint‖ / ‖checkpoint‖."""
        return math.sqrt(self.squares / self.reference) if self.reference else math.inf if self.squares else 0.0


def difference(held: Held, left: str | None = None) -> Difference:
    """How far a tensor is from the checkpoint's; with the rounding that is `left` in it nothing is looked for."""
    if left == "none":
        return Difference(held.values.size)
    found, greatest = Difference(places=np.zeros(held.shape[1], int)), -1.0
    for start, stop in held.chunks():
        engine, right = held.rows(start, stop), held.right(start, stop)
        found.count += engine.size
        found.reference += float(np.nansum(right**2))
        if np.array_equal(engine, right):
            continue
        with np.errstate(all="ignore"):
            apart = np.abs(engine - right)
            found.squares += float(np.nansum(apart**2))
        if left is not None:
            continue
        wrong = beyond(engine, right, "bfloat16")
        found.wrong += int(wrong.sum())
        found.wrong_rows += int(wrong.any(axis=1).sum())
        found.places += wrong.sum(axis=0)
        apart = np.where(wrong, np.where(np.isfinite(apart), apart, np.inf), -1.0)
        row, column = np.unravel_index(int(apart.argmax()), apart.shape)
        if apart[row, column] > greatest:
            greatest = float(apart[row, column])
            place = (start + int(row), int(column))
            found.worst = (*place, float(engine[row, column]), float(right[row, column]))
    return found
