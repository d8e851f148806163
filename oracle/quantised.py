"""Matrices and activations as engines keep them in eight bits or fewer, for those of whom nobody has a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxref.activations import round_activations

FLOAT8: dict[str, Any] = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
# What is left of some rows in float64; the second array, if any, is the whole that they are of.
Round = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Kind:
    """One way to keep a matrix: what it makes of it and, in the same engines, of the activations it meets.

    `error` is what it makes of normally distributed numbers, relative L2; rows must be whole blocks of `block`.
    """

    words: str
    matrix: Round
    rows: Round
    error: float
    block: int = 1


def blocks(name: str, x: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
    """Rows in ggml's blocks of 32, by the `gguf` package."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    return quants.dequantize(quants.quantize(np.ascontiguousarray(x, np.float32), kind), kind).astype(np.float64)


def q8_0(x: np.ndarray) -> np.ndarray:
    """Activations in blocks of Q8_0 as llama.cpp rounds them, which decides halves otherwise than `blocks`."""
    return np.asarray(round_activations(jnp.asarray(x, jnp.float32), "Q8_0"), np.float64)


def int8(x: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
    """Rows [..., h] in 255 steps of their greatest value."""
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / np.where(step == 0, 1, step)) * step


def cast(dtype: Any, x: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
    """The nearest values of a type."""
    return x.astype(dtype).astype(np.float64)


def scaled(dtype: Any, by_row: bool, x: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
    """As `cast`, with a float32 scale by which the greatest value of each row, or of all, becomes the type's."""
    whole = x if whole is None else whole
    greatest = np.abs(x).max(axis=-1, keepdims=True) if by_row else np.maximum(whole.max(), -whole.min())
    scale = np.where(greatest == 0, 1, greatest / float(ml_dtypes.finfo(dtype).max)).astype(np.float32)
    return cast(dtype, x.astype(np.float32) / scale) * scale.astype(np.float64)


def _same(words: str, rounded: Round, error: float) -> Kind:
    """Weights and activations alike."""
    return Kind(words, rounded, rounded, error)


_E4M3 = FLOAT8["float8_e4m3fn"]
# By the names of GGUF's types and of NumPy's.
KINDS: dict[str, Kind] = {
    **{
        name: Kind(f"blocks of {name}", partial(blocks, name), q8_0, error, 32)
        for name, error in (("Q8_0", 0.0056), ("Q5_1", 0.039), ("Q5_0", 0.044), ("Q4_1", 0.080), ("Q4_0", 0.091))
    },
    "int8": _same("int8, a scale for each row", int8, 0.0064),
    **{name: _same(name, partial(cast, dtype), 0.03) for name, dtype in FLOAT8.items()},
    "float8_e4m3fn tensor": _same("float8_e4m3fn, one scale for all", partial(scaled, _E4M3, False), 0.027),
    "float8_e4m3fn rows": _same("float8_e4m3fn, a scale for each row", partial(scaled, _E4M3, True), 0.027),
}
