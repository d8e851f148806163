"""The small operations every decoder shares. Each is jitted by itself, so that no fusion depends on what is captured.

Dimension key: S positions, D hidden_size, I any input width, O any output width, V vocab_size.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from jaxref.activations import Weight
from jaxref.precision import Numerics

stage_function = partial(jax.jit, static_argnames=("numerics",))


@stage_function
def embed(tokens: Int[Array, " S"], table: Float[Array, "V D"], *, numerics: Numerics) -> Float[Array, "S D"]:
    """Rows of the embedding table [V, D] for token ids [S]."""
    return table.astype(numerics.compute)[tokens]


def normalise(x: Array, weight: Array, eps: float, numerics: Numerics) -> Array:
    """RMSNorm (arXiv:1910.07467) over the last axis: x / sqrt(mean(x²) + eps) · weight.

    Two rounding points, as Hugging Face has them: the normalised value, and its product with the weight.
    """
    wide = numerics.widen(x)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    unit = numerics.round(wide * jax.lax.rsqrt(mean_square + eps))
    return numerics.round(numerics.widen(weight) * numerics.widen(unit))


@partial(jax.jit, static_argnames=("eps", "numerics"))
def rms_norm(
    x: Float[Array, "S D"], weight: Float[Array, " D"], *, eps: float, numerics: Numerics
) -> Float[Array, "S D"]:
    """RMSNorm of the hidden state."""
    return normalise(x, weight, eps, numerics)


@stage_function
def linear(x: Float[Array, "S I"], weight: Float[Array, "O I"] | Weight, *, numerics: Numerics) -> Float[Array, "S O"]:
    """x · Wᵀ with the weight as the checkpoint stores it, [out, in]; rounded once."""
    return numerics.round(numerics.product(x, weight))


@stage_function
def rounded(x: Float[Array, "*S D"], *, numerics: Numerics) -> Float[Array, "*S D"]:
    """Sums as they are stored."""
    return numerics.round(x)


@stage_function
def add(x: Float[Array, "S D"], y: Float[Array, "S D"], *, numerics: Numerics) -> Float[Array, "S D"]:
    """The residual stream."""
    return numerics.round(numerics.widen(x) + numerics.widen(y))


@stage_function
def silu(x: Float[Array, "*S F"], *, numerics: Numerics) -> Float[Array, "*S F"]:
    """x · sigmoid(x) (arXiv:1702.03118)."""
    return numerics.round(jax.nn.silu(numerics.widen(x)))


@stage_function
def multiply(x: Float[Array, "*S F"], y: Float[Array, "*S F"], *, numerics: Numerics) -> Float[Array, "*S F"]:
    """The gate of SwiGLU (arXiv:2002.05202): silu(gate) · up."""
    return numerics.round(numerics.widen(x) * numerics.widen(y))
