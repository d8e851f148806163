"""What is left of a number that leaves a type's range, in NumPy float64."""

from __future__ import annotations

import numpy as np

# How far from exact float32 may be where it is rounded further: a sum of a thousand terms.
SLACK = 2.0**-20
# The greatest number of a type; bfloat16 reaches as far as float32.
RANGES = {"float32": float(np.finfo(np.float32).max), "float16": float(np.finfo(np.float16).max)}


def held(x: np.ndarray, kind: str) -> np.ndarray:
    """The same as this type holds it: infinite where it is beyond its range."""
    with np.errstate(over="ignore"):
        return x.astype(kind).astype(np.float64)


def nearest(x: np.ndarray, kind: str, shown: np.ndarray) -> np.ndarray:
    """As `held`; where `x`, a sum in float32, may lie on either side of a half, the neighbour that is shown."""
    below, above = (held(x * (1 + sign * SLACK), kind) for sign in (-1, 1))
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(below - shown) < np.abs(above - shown), below, above)


def shares(scores: np.ndarray, kind: str) -> np.ndarray:
    """eˣ over the sum of eˣ of the last axis, with nothing subtracted: NaN where both are infinite."""
    with np.errstate(all="ignore"):
        powers = held(np.exp(scores), kind)
        return powers / held(powers.sum(axis=-1, keepdims=True), kind)


def silu(x: np.ndarray, kind: str) -> np.ndarray:
    """x·eˣ/(1 + eˣ)."""
    with np.errstate(all="ignore"):
        powers = held(np.exp(x), kind)
        return x * (powers / (1 + powers))


def mean_square(x: np.ndarray, counted: np.ndarray, how: str) -> np.ndarray:
    """The mean of squares that are computed in float16, each ("each") or with their sum ("sum")."""
    squares = held(np.square(held(x, "float16")), "float16") * counted
    total = squares.sum(axis=-1, keepdims=True)
    return (held(total, "float16") if how == "sum" else total) / x.shape[-1]
