"""The experts of one layer, run in one of two ways that give the same numbers.

`all_experts` is pure and needs every expert in memory: each token goes through all of them, and what it chose is kept.
`chosen_experts` asks for one expert after another, only for those that some token chose, and runs only those tokens.

Dimension key: S positions, D hidden_size, E experts, A experts per token, M moe_intermediate_size, C rows in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jaxref import ops
from jaxref.feedforward import moe_ffn_out, swiglu
from jaxref.mesh import to_host
from jaxref.precision import Numerics
from weights import Expert

# An expert takes its tokens in chunks of at most so many, padded to one shape so that it is compiled once.
CHUNK_ROWS = 64

# Yields the experts with these ids in their order.
ExpertSource = Callable[[list[int]], Iterator[Expert]]


class Inside(NamedTuple):
    """What goes on inside the chosen experts, in the order of `moe_router_indices`; `out` is not yet weighted."""

    gate: Array  # [S, A, M]
    up: Array  # [S, A, M]
    swigl: Array  # [S, A, M]
    out: Array  # [S, A, D]


def run_expert(x: Array, expert: Expert, numerics: Numerics) -> Inside:
    """One expert's SwiGLU on rows [C, D]: gate, up and swigl [C, M], out [C, D]."""
    gate = ops.linear(x, expert.gate_proj, numerics=numerics)
    up = ops.linear(x, expert.up_proj, numerics=numerics)
    swigl = swiglu(gate, up, numerics=numerics)
    return Inside(gate, up, swigl, ops.linear(swigl, expert.down_proj, numerics=numerics))


@partial(jax.jit, static_argnames=("numerics",))
def all_experts(
    x: Float[Array, "S D"],
    weights: Float[Array, "S A"],
    indices: Int[Array, "S A"],
    experts: Expert,
    *,
    numerics: Numerics,
) -> tuple[Inside, Float[Array, "S D"]]:
    """The inside of the chosen experts and their weighted sum, with `experts` stacked along E."""
    (S, A), M, D = indices.shape, experts.gate_proj.shape[1], x.shape[1]
    empty = Inside(*(jnp.zeros((S, A, size), numerics.compute) for size in (M, M, M, D)))

    def step(kept: Inside, each: tuple[Array, Expert]) -> tuple[Inside, None]:
        number, expert = each
        chosen = (indices == number)[..., None]
        found = run_expert(x, expert, numerics)
        return Inside(*(jnp.where(chosen, new[:, None], old) for new, old in zip(found, kept, strict=True))), None

    inside, _ = jax.lax.scan(step, empty, (jnp.arange(experts.gate_proj.shape[0]), experts))
    return inside, moe_ffn_out(inside.out, weights, indices, numerics=numerics)


@partial(jax.jit, static_argnames=("numerics",), donate_argnames=("total",))
def _accumulate(
    total: Float[Array, "S D"],
    out: Float[Array, "C D"],
    weights: Float[Array, " C"],
    tokens: Int[Array, " C"],
    *,
    numerics: Numerics,
) -> Float[Array, "S D"]:
    """Add one expert's weighted rows to those of its tokens, in place. A token beyond S is padding and is dropped.

    No two rows are the same token's, so there is no order of additions that a GPU could change.
    """
    weighted = numerics.rounded(numerics.widen(out) * numerics.widen(weights)[:, None])
    before = total.at[tokens].get(mode="fill", fill_value=0)
    after = numerics.round(numerics.widen(before) + weighted)
    return total.at[tokens].set(after, mode="drop", unique_indices=True)


@jax.jit
def _rows(x: Float[Array, "S D"], tokens: Int[Array, " C"]) -> Float[Array, "C D"]:
    return x.at[tokens].get(mode="fill", fill_value=0)


def chosen_experts(
    x: Array, weights: Array, indices: Array, source: ExpertSource, keep: np.ndarray, numerics: Numerics
) -> tuple[Inside, Array]:
    """The inside of the chosen experts for the positions `keep`, and the weighted sum [S, D] for all.

    The experts come from `source` in the order of their ids, which is the order of the sum.
    """
    routed, shares = to_host(indices), to_host(weights)
    places = np.full(x.shape[0], -1)
    places[keep] = np.arange(len(keep))
    kept: Inside | None = None
    total = jnp.zeros(x.shape, numerics.compute)
    used = [int(e) for e in np.unique(routed)]
    for number, expert in zip(used, source(used), strict=True):
        tokens, ranks = np.nonzero(routed == number)
        for chunk in _chunks(len(tokens), x.shape[0]):
            found, total = _run_chunk(x, total, tokens[chunk], shares[tokens[chunk], ranks[chunk]], expert, numerics)
            kept = _keep(kept, found, places[tokens[chunk]], ranks[chunk], (len(keep), routed.shape[1]))
        total.block_until_ready()
    assert kept is not None  # every token chooses A ≥ 1 experts
    return kept, total


def _chunks(count: int, positions: int) -> Iterator[slice]:
    rows = min(positions, CHUNK_ROWS)
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _run_chunk(
    x: Array, total: Array, tokens: np.ndarray, weights: np.ndarray, expert: Expert, numerics: Numerics
) -> tuple[Inside, Array]:
    """One expert on some of its tokens, padded to the one shape that all chunks have."""
    size = min(x.shape[0], CHUNK_ROWS)
    padded = np.full(size, x.shape[0], np.int32)
    padded[: len(tokens)] = tokens
    shares = np.zeros(size, weights.dtype)
    shares[: len(tokens)] = weights
    found = run_expert(_rows(x, padded), expert, numerics)
    return found, _accumulate(total, found.out, shares, padded, numerics=numerics)


def _keep(kept: Inside | None, found: Inside, places: np.ndarray, ranks: np.ndarray, shape: tuple[int, int]) -> Inside:
    """Copy the rows of kept positions (place ≥ 0) to their rank."""
    if kept is None:
        kept = Inside(*(np.zeros((*shape, value.shape[-1]), value.dtype) for value in found))  # type: ignore[arg-type]
    rows = np.flatnonzero(places >= 0)
    if rows.size:
        for target, value in zip(kept, found, strict=True):
            target[places[rows], ranks[rows]] = to_host(value)[rows]  # type: ignore[index]
    return kept
