"""The feed-forward half of a layer: SwiGLU, or a router and its chosen experts.

Dimension key: S positions, D hidden_size, F intermediate_size, E experts, A experts per token, M moe_intermediate_size.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from jaxref import ops
from jaxref.precision import Numerics


def _chosen(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest probabilities and their experts [S, A], descending; of equals the lower id comes first."""
    weights, indices = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return weights, indices


@partial(jax.jit, static_argnames=("count", "renormalise", "numerics"))
def moe_router(
    logits: Float[Array, "S E"], *, count: int, renormalise: bool, numerics: Numerics
) -> Float[Array, "S A"]:
    """Weights of the chosen experts: softmax over all E, the largest A, renormalised where the model says so."""
    weights, _ = _chosen(numerics.widen(logits), count)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return numerics.round(weights)


@partial(jax.jit, static_argnames=("count", "numerics"))
def moe_router_indices(logits: Float[Array, "S E"], *, count: int, numerics: Numerics) -> Int[Array, "S A"]:
    """The chosen experts' ids, by descending weight."""
    _, indices = _chosen(numerics.widen(logits), count)
    return indices


@partial(jax.jit, static_argnames=("numerics",))
def swiglu(gate: Float[Array, "*S M"], up: Float[Array, "*S M"], *, numerics: Numerics) -> Float[Array, "*S M"]:
    """silu(gate) · up (arXiv:2002.05202), with both of its rounding points."""
    return ops.multiply(ops.silu(gate, numerics=numerics), up, numerics=numerics)


@partial(jax.jit, static_argnames=("numerics",))
def moe_ffn_out(
    outputs: Float[Array, "S A D"], weights: Float[Array, "S A"], indices: Int[Array, "S A"], *, numerics: Numerics
) -> Float[Array, "S D"]:
    """Σ weight · output over a token's experts, in the order of their ids, rounded after each, as in Hugging Face."""
    order = jnp.argsort(indices, axis=-1)
    weighted = numerics.rounded(numerics.widen(outputs) * numerics.widen(weights)[..., None])
    weighted = jnp.take_along_axis(weighted, order[..., None], axis=1)
    total = numerics.round(weighted[:, 0])
    for rank in range(1, weighted.shape[1]):
        total = ops.add(total, weighted[:, rank], numerics=numerics)
    return total
