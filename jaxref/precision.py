"""What float32, float64, float16 and bfloat16 mean: which dtype holds the activations, which one the sums."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxref.activations import Matrix, Weight, round_activations
from weights import UserError

# Without it, JAX on an NVIDIA GPU multiplies in TF32, with ten bits of mantissa.
Device = Any  # a jax.Device, whose class is private
PRECISION = lax.Precision.HIGHEST


@jax.tree_util.register_static
@dataclass(frozen=True)
class Numerics:
    """One precision.

    `compute` holds parameters and activations, `wide` norms, softmax and angles, `sums` the sums of matrix products.
    """

    name: str
    compute: np.dtype[Any]
    wide: np.dtype[Any]
    sums: np.dtype[Any]

    def widen(self, x: Array) -> Array:
        """The same values in `wide`, in which operations are carried out."""
        return x.astype(self.wide)

    def round(self, x: Array) -> Array:
        """A rounding point: the value as it would be stored in `compute`.

        The barrier keeps XLA from dropping a narrowing that is followed by a widening (`xla_allow_excess_precision`).
        """
        y = x.astype(self.compute)
        return y if self.compute == self.wide else lax.optimization_barrier(y)

    def context(self) -> AbstractContextManager[Any]:
        """Where the work of this precision must run: 64-bit types are off in JAX unless asked for."""
        return jax.enable_x64(self.sums == np.float64)

    def dot(self, equation: str, a: Array, b: Matrix) -> Array:
        """Every contraction of the forward pass: in `sums`, at the highest precision, not yet rounded."""
        if isinstance(b, Weight):
            a, b = round_activations(a, b.activation), b.values
        a, b = a.astype(self.sums), b.astype(self.sums)
        return jnp.einsum(equation, a, b, precision=PRECISION, preferred_element_type=self.sums)


def _numerics(name: str, wide: str, sums: str) -> Numerics:
    return Numerics(name, np.dtype(jnp.dtype(name)), np.dtype(wide), np.dtype(sums))


# In half precision a product is rounded once, and whether up or down must not hang on the order of a sum: float32 sums
# of 900 terms decide 2 in 1000 float16 roundings wrongly, float64 sums next to none.
NUMERICS = {
    "float32": _numerics("float32", "float32", "float32"),
    "float64": _numerics("float64", "float64", "float64"),
    "float16": _numerics("float16", "float32", "float64"),
    "bfloat16": _numerics("bfloat16", "float32", "float64"),
}


def numerics_of(dtype: str) -> Numerics:
    """Look up a precision by name. Raises `UserError` for an unknown one."""
    if dtype not in NUMERICS:
        raise UserError(f"dtype {dtype!r} is not known; known are {', '.join(NUMERICS)}")
    return NUMERICS[dtype]
