"""The forward pass, as the papers write it: every stage is one jitted function, and each is yielded when it exists.

    embedding → L × (norm → attention → residual → norm → feed-forward → residual) → norm → head

Dimension key: S positions, D hidden_size, V vocab_size; the rest is in `jaxref/stages.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref import attention as attn
from jaxref import feedforward as ffn
from jaxref import ops
from jaxref.activations import Matrix
from jaxref.experts import all_experts, chosen_experts
from jaxref.pieces import Past, Piece, Pieces, Place, Routing, collect
from jaxref.precision import Numerics, numerics_of
from weights import Config, Layer, Params

Trace = dict[str, Any]  # {"layer-0": {stage: array}, …, "final_norm": [S, D], "lm_head": [S, V]}

# The largest block of attention scores, in numbers: memory grows as S, not as S².
SCORES_IN_BLOCK = 1 << 24
# The largest block of the output projection, in numbers: the head never has to fit in memory. On a CPU a block is
# converted and multiplied while it lies in the cache; elsewhere it is one more program to start, so they are fewer.
HEAD_IN_BLOCK, HEAD_IN_BLOCK_ELSEWHERE = 1 << 22, 1 << 24


def decoder_layer(
    layer: Layer,
    hidden: Array,
    positions: Array,
    place: Place,
    routing: Routing | None = None,
    past: Past | None = None,
) -> Pieces:
    """One decoder layer [S, D] → [S, D].

    Without `routing`, a MoE layer's experts are those in `layer`. With `past`, `positions` continue what is there.
    """
    config, numerics = place.config, place.numerics
    x = ops.rms_norm(hidden, layer.input_layernorm, eps=config.rms_norm_eps, numerics=numerics)
    yield Piece("attn_norm", x)
    x = yield from self_attention(layer, x, positions, place, past)
    hidden = ops.add(hidden, x, numerics=numerics)
    yield Piece("post_attn_residual", hidden)
    x = ops.rms_norm(hidden, layer.post_attention_layernorm, eps=config.rms_norm_eps, numerics=numerics)
    yield Piece("ffn_norm", x)
    if config.is_moe(place.layer):
        x = yield from mixture_of_experts(layer, x, place, routing)
    else:
        x = yield from feed_forward(layer, x, numerics)
    hidden = ops.add(hidden, x, numerics=numerics)
    yield Piece("post_ffn_residual", hidden)
    return hidden


def self_attention(layer: Layer, x: Array, positions: Array, place: Place, past: Past | None) -> Pieces:
    """Grouped-query attention [S, D] → [S, D]: projections, per-head norms, RoPE, softmax over the past."""
    config, numerics = place.config, place.numerics
    sums = attn.qkv_matmul(x, layer.q_proj, layer.k_proj, layer.v_proj, rounded=False, numerics=numerics)
    qkv = ops.rounded(sums, numerics=numerics)
    yield Piece("qkv_matmul", qkv)
    if config.qkv_bias:
        qkv = attn.qkv_bias(sums, layer.q_bias, layer.k_bias, layer.v_bias, numerics=numerics)
        yield Piece("qkv_bias", qkv)
    q, k, k_start = qkv, qkv, config.q_width
    if config.qk_norm:
        eps = config.rms_norm_eps
        q = attn.head_norm(qkv, layer.q_norm, start=0, heads=config.num_attention_heads, eps=eps, numerics=numerics)
        yield Piece("q_norm", q)
        k = attn.head_norm(
            qkv, layer.k_norm, start=k_start, heads=config.num_key_value_heads, eps=eps, numerics=numerics
        )
        yield Piece("k_norm", k)
        k_start = 0
    q = attn.rope(q, positions, **place.rope(config.num_attention_heads, 0))
    yield Piece("q_post_rope", q)
    k = attn.rope(k, positions, **place.rope(config.num_key_value_heads, k_start))
    yield Piece("k_post_rope", k)
    keys, packed = (k, qkv) if past is None else past.extended(k, qkv, positions)
    x = yield from attend(q, keys, packed, positions, place)
    yield Piece("attention", x)
    x = ops.linear(x, layer.o_proj, numerics=numerics)
    yield Piece("attn_out", x)
    return x


def attend(q: Array, k: Array, qkv: Array, positions: Array, place: Place) -> Pieces:
    """softmax(q·kᵀ/√h)·v → [S, H·h], by blocks of query rows whose size depends on the shapes alone."""
    config, numerics = place.config, place.numerics
    shape = {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "numerics": numerics}
    window, v_start = config.window(place.layer), config.q_width + config.kv_width
    count, key_positions = q.shape[0], np.arange(k.shape[0])
    rows = query_rows(config.num_attention_heads, count, k.shape[0])
    mixed = []
    for row in range(0, count, rows):
        # Even a slice of everything would cost a millisecond of dispatching.
        queries, at = (q, positions) if rows == count else (q[row : row + rows], positions[row : row + rows])
        scores = attn.attn_scores(queries, k, **shape)
        yield Piece("attn_scores", scores, row)
        weights = attn.attn_softmax(scores, at, key_positions, window=window, numerics=numerics)
        yield Piece("attn_softmax", weights, row)
        mixed.append(attn.attention(weights, qkv, start=v_start, **shape))
        del scores, weights
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed)


def feed_forward(layer: Layer, x: Array, numerics: Numerics) -> Pieces:
    """SwiGLU [S, D] → [S, D]."""
    gate = ops.linear(x, layer.gate_proj, numerics=numerics)
    yield Piece("ffn_gate", gate)
    up = ops.linear(x, layer.up_proj, numerics=numerics)
    yield Piece("ffn_up", up)
    x = ops.silu(gate, numerics=numerics)
    yield Piece("ffn_silu", x)
    x = ops.multiply(x, up, numerics=numerics)
    yield Piece("ffn_swigl", x)
    x = ops.linear(x, layer.down_proj, numerics=numerics)
    yield Piece("ffn_out", x)
    return x


def mixture_of_experts(layer: Layer, x: Array, place: Place, routing: Routing | None) -> Pieces:
    """Each position by its A experts of E [S, D] → [S, D] (arXiv:1701.06538, the routing of Qwen3-MoE)."""
    numerics, count = place.numerics, place.config.num_experts_per_tok
    logits = ops.linear(x, layer.router, numerics=numerics)
    yield Piece("moe_router_logits", logits)
    weights = ffn.moe_router(logits, count=count, renormalise=place.config.norm_topk_prob, numerics=numerics)
    yield Piece("moe_router", weights)
    indices = ffn.moe_router_indices(logits, count=count, numerics=numerics)
    yield Piece("moe_router_indices", indices)
    if routing is None:
        inside, x = all_experts(x, weights, indices, layer.experts, numerics=numerics)
    else:
        inside, x = chosen_experts(x, weights, indices, *routing, numerics)
    for name, value in inside._asdict().items():
        yield Piece(f"moe_expert_{name}", value, selected=routing is not None)
    yield Piece("moe_ffn_out", x)
    return x


def lm_head(x: Array, blocks: Iterator[Matrix], numerics: Numerics) -> Array:
    """[S, D] → [S, V], the output projection given in blocks of the vocabulary."""
    return jnp.concatenate([ops.linear(x, block, numerics=numerics) for block in blocks], axis=-1)


def query_rows(heads: int, count: int, keys: int) -> int:
    """How many of `count` query rows, each of `keys` scores a head, one block of attention holds."""
    return min(count, max(1, SCORES_IN_BLOCK // (heads * keys)))


def head_rows(config: Config, platform: str = "cpu") -> int:
    """How many rows of the output projection one block holds."""
    most = HEAD_IN_BLOCK if platform == "cpu" else HEAD_IN_BLOCK_ELSEWHERE
    return min(config.vocab_size, max(1, most // config.hidden_size))


def forward(params: Params, tokens: ArrayLike, config: Config, dtype: str = "float32") -> Trace:
    """Every intermediate of one prefill, for all positions; pure, so that `jax.jit(forward)` works as it stands.

    `tokens` [S] are token ids. Returns a pytree whose paths are those of a dumped tree: `{"layer-0": {"embedding":
    [S, D], …}, …, "final_norm": [S, D], "lm_head": [S, V]}`, in the dtype of the precision (float32, float64, float16,
    bfloat16). Raises `UserError` for another dtype.
    """
    numerics = numerics_of(dtype)
    if jax.device_count() == 1:  # of several, each may hold a part of the parameters, and the kernel cannot be split
        numerics = numerics.on(jax.devices()[0])
    with numerics.context():
        params = jax.tree.map(lambda w: jnp.asarray(w, numerics.kept(w.dtype)), params)
        tokens = jnp.asarray(tokens)
        embedding = ops.embed(tokens, params.embed_tokens, numerics=numerics)
        rows = head_rows(config, "gpu" if numerics.gpu else "cpu")
        head = [params.head[i : i + rows] for i in range(0, config.vocab_size, rows)]
        return after_embedding(embedding, params.layers, params.norm, head, config, numerics)


def after_embedding(
    embedding: Array,
    layers: Sequence[Layer],
    norm: Array,
    head: Sequence[Matrix],
    config: Config,
    numerics: Numerics,
) -> Trace:
    """What `forward` returns, from the embedded tokens [S, D] on, with the head in blocks of the vocabulary."""
    hidden, positions, trace = embedding, jnp.arange(embedding.shape[0]), {}
    for index, layer in enumerate(layers):
        stages, hidden = collect(decoder_layer(layer, hidden, positions, Place(config, index, numerics)))
        trace[f"layer-{index}"] = ({} if index else {"embedding": embedding}) | stages
    x = ops.rms_norm(hidden, norm, eps=config.rms_norm_eps, numerics=numerics)
    return trace | {"final_norm": x, "lm_head": lm_head(x, iter(head), numerics)}
