"""What float32, float64, float16 and bfloat16 mean: which dtype holds the activations, which one the sums."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jaxref import few_rows
from jaxref.activations import Matrix, Weight, round_activations
from weights import UserError

Device = Any  # a jax.Device, whose class is private
# Without it, JAX on an NVIDIA GPU multiplies in TF32, with ten bits of mantissa.
PRECISION = lax.Precision.HIGHEST


@jax.tree_util.register_static
@dataclass(frozen=True)
class Numerics:
    """One precision.

    `compute` holds parameters and activations, `wide` norms, softmax and angles, `sums` the sums of matrix products.
    With `gpu` one NVIDIA GPU computes: parameters lie there as they are stored, where widening them changes no value,
    and products of few rows have a kernel of their own.
    """

    name: str
    compute: np.dtype[Any]
    wide: np.dtype[Any]
    sums: np.dtype[Any]
    gpu: bool = False

    def on(self, device: Device, mesh: Mesh | None = None) -> Numerics:
        """The same for a device, or for a mesh that begins with it."""
        alone = mesh is None or mesh.size == 1
        return replace(self, gpu=device.platform == "gpu" and alone and few_rows.runs_on(device))

    def widen(self, x: Array) -> Array:
        """The same values in `wide`, in which operations are carried out."""
        return x.astype(self.wide)

    def round(self, x: Array) -> Array:
        """A rounding point: the value as it would be stored in `compute`.

        From float64 most processors come to half precision by way of float32, which rounds twice. The barrier keeps XLA
        from dropping a narrowing that is followed by a widening (`xla_allow_excess_precision`).
        """
        y = (self.rounded(x) if x.dtype == np.float64 else x).astype(self.compute)
        return y if self.compute == self.wide else lax.optimization_barrier(y)

    def rounded(self, x: Array) -> Array:
        """A rounding point right before a sum: the values of `x` as they would be stored, in the dtype that they have.

        Of `wide` values `widen(round(x))` means the same, but on a machine with half-precision arithmetic a compiler
        makes one step of a product and the sum after it, which rounds once.
        """
        if self.compute == self.wide:
            return x
        kept = jnp.finfo(self.compute)
        found = lax.reduce_precision(x, kept.nexp, kept.nmant)
        if kept.nexp == jnp.finfo(x.dtype).nexp:
            return found
        step = float(kept.smallest_subnormal)  # below the normal numbers, of which alone that operation knows
        return jnp.where(jnp.abs(x) < float(kept.smallest_normal), jnp.round(x / step) * step, found)

    def context(self) -> AbstractContextManager[Any]:
        """Where the work of this precision must run: 64-bit types are off in JAX unless asked for."""
        return jax.enable_x64(self.sums == np.float64)

    def kept(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype in which a parameter stored so lies on the device."""
        return stored if self.gpu and np.can_cast(stored, self.compute) else self.compute

    def dot(self, equation: str, a: Array, b: Array) -> Array:
        """A contraction in `sums`, at the highest precision, not yet rounded."""
        a, b = a.astype(self.sums), b.astype(self.sums)
        return jnp.einsum(equation, a, b, precision=PRECISION, preferred_element_type=self.sums)

    def product(self, x: Array, weight: Matrix) -> Array:
        """x · Wᵀ for x [S, I] and a weight [O, I] as the checkpoint has it: in `sums`, not yet rounded."""
        if isinstance(weight, Weight):
            x, weight = round_activations(x, weight.activation), weight.values
        x, einsum = x.astype(self.sums), partial(self.dot, "si,oi->so")
        if self.gpu and few_rows.fits(x, weight):
            return lax.platform_dependent(x, weight, cuda=few_rows.product, default=einsum)
        return einsum(x, weight)


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
