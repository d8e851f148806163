"""Grouped-query attention, stage by stage: query head j reads kv head j // G.

Dimension key: S query positions, T key positions, H query heads, K kv heads, G = H/K, h head_dim.
`start` is the first column of the part of a packed [q | k | v] row that a stage reads.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float, Int

from jaxref.activations import Weight
from jaxref.ops import normalise
from jaxref.precision import Numerics
from jaxref.rope import inverse_frequencies
from weights.config import RopeScaling


def _heads(x: Array, start: int, heads: int, head_dim: int) -> Array:
    """Columns `start:start + heads·h` as [S, heads, h]."""
    return x[:, start : start + heads * head_dim].reshape(x.shape[0], heads, head_dim)


@partial(jax.jit, static_argnames=("rounded", "numerics"))
def qkv_matmul(
    x: Float[Array, "S D"],
    q_proj: Float[Array, "Hh D"] | Weight,
    k_proj: Float[Array, "Kh D"] | Weight,
    v_proj: Float[Array, "Kh D"] | Weight,
    *,
    rounded: bool,
    numerics: Numerics,
) -> Float[Array, "S QKV"]:
    """[S, (H+2K)h]: q, k and v side by side, before the bias; with `rounded` False as they were summed."""
    qkv = jnp.concatenate([numerics.product(x, w) for w in (q_proj, k_proj, v_proj)], axis=-1)
    return numerics.round(qkv) if rounded else qkv


@partial(jax.jit, static_argnames=("numerics",))
def qkv_bias(
    qkv: Float[Array, "S QKV"],
    q_bias: Float[Array, " Hh"],
    k_bias: Float[Array, " Kh"],
    v_bias: Float[Array, " Kh"],
    *,
    numerics: Numerics,
) -> Float[Array, "S QKV"]:
    """[S, (H+2K)h]: after the biases.

    Hugging Face adds them to the sums before these are rounded; replayed on a rounded product in half precision, the
    result is rounded twice.
    """
    bias = jnp.concatenate([q_bias, k_bias, v_bias])
    return numerics.round(numerics.widen(qkv) + numerics.widen(bias))


@partial(jax.jit, static_argnames=("start", "heads", "eps", "numerics"))
def head_norm(
    qkv: Float[Array, "S QKV"], weight: Float[Array, " h"], *, start: int, heads: int, eps: float, numerics: Numerics
) -> Float[Array, "S headsh"]:
    """[S, heads·h]: RMSNorm of each head of q or of k by itself (Qwen3)."""
    x = _heads(qkv, start, heads, weight.shape[0])
    return normalise(x, weight, eps, numerics).reshape(x.shape[0], -1)


@partial(jax.jit, static_argnames=("start", "heads", "head_dim", "theta", "scaling", "numerics"))
def rope(
    x: Float[Array, "S width"],
    positions: Int[Array, " S"],
    *,
    start: int,
    heads: int,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    numerics: Numerics,
) -> Float[Array, "S headsh"]:
    """[S, heads·h] after rotation. Dimension i turns with i + h/2 (the "NeoX" pairing), positions count from 0."""
    frequencies = jnp.asarray(inverse_frequencies(head_dim, theta, scaling), numerics.wide)
    angles = positions.astype(numerics.wide)[:, None] * frequencies
    factor = 1.0 if scaling is None else scaling.attention_factor
    cos = numerics.widen(numerics.round(jnp.cos(angles) * factor))[:, None, :]
    sin = numerics.widen(numerics.round(jnp.sin(angles) * factor))[:, None, :]
    wide = numerics.widen(_heads(x, start, heads, head_dim))
    left, right = wide[..., : head_dim // 2], wide[..., head_dim // 2 :]

    def product(a: Array, b: Array) -> Array:
        return numerics.rounded(a * b)

    turned = [product(left, cos) - product(right, sin), product(right, cos) + product(left, sin)]
    return numerics.round(jnp.concatenate(turned, axis=-1)).reshape(x.shape[0], -1)


@partial(jax.jit, static_argnames=("kv_heads", "head_dim", "numerics"))
def attn_scores(
    q: Float[Array, "S Hh"], k: Float[Array, "T Kh"], *, kv_heads: int, head_dim: int, numerics: Numerics
) -> Float[Array, "H S T"]:
    """[H, S, T]: q · kᵀ / √h of every pair, causal or not. The product is rounded, then the scaled value."""
    # Group-major: one matrix product a kv head, four times as fast on a CPU as an einsum over token-major heads.
    queries = q.reshape(q.shape[0], kv_heads, -1, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    keys = k.reshape(k.shape[0], kv_heads, head_dim).transpose(1, 0, 2)
    raw = numerics.widen(numerics.round(numerics.dot("krh,kth->krt", queries, keys)))
    return numerics.round(raw * head_dim**-0.5).reshape(-1, q.shape[0], k.shape[0])


@partial(jax.jit, static_argnames=("window", "numerics"))
def attn_softmax(
    scores: Float[Array, "H S T"],
    positions: Int[Array, " S"],
    key_positions: Int[Array, " T"],
    *,
    window: int | None,
    numerics: Numerics,
) -> Float[Array, "H S T"]:
    """[H, S, T]: softmax over the keys a query may see: itself and before it, at most `window` of them."""
    distance = positions[:, None] - key_positions[None, :]
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    masked = jnp.where(visible, numerics.widen(scores), -jnp.inf)
    return numerics.round(jax.nn.softmax(masked, axis=-1))


@partial(jax.jit, static_argnames=("start", "kv_heads", "head_dim", "numerics"))
def attention(
    weights: Float[Array, "H S T"],
    qkv: Float[Array, "T QKV"],
    *,
    start: int,
    kv_heads: int,
    head_dim: int,
    numerics: Numerics,
) -> Float[Array, "S Hh"]:
    """[S, H·h]: softmax · V, token-major, before the output projection."""
    heads, rows, keys = weights.shape
    values = _heads(qkv, start, kv_heads, head_dim).transpose(1, 0, 2)
    mixed = numerics.dot("krt,kth->krh", weights.reshape(kv_heads, -1, keys), values)
    return numerics.round(mixed).reshape(heads, rows, head_dim).transpose(1, 0, 2).reshape(rows, -1)
