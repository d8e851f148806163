"""THE table of hypotheses: what engines get wrong, at which stages, and how the stage must be switched to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracle import fits
from oracle.bench import Bench, Get, Pick
from oracle.variants import Switches


@dataclass(frozen=True)
class Try:
    """One variant of a hypothesis: its parameter, the switches, and how a person says it."""

    parameter: Any
    switches: Switches
    words: str


Tries = Callable[[Bench], Iterable[Try]]


@dataclass(frozen=True)
class Hypothesis:
    """One row. A generic one (a fitted scale) counts only where no specific one fits."""

    name: str
    stages: tuple[str, ...]
    tries: Tries
    generic: bool = False


def _switch(words: str, parameter: Any = None, **switches: Any) -> Tries:
    """A hypothesis without anything to find out."""
    return lambda bench: (Try(parameter, switches, words),)


def _each(words: str, name: str, *values: Any) -> Tries:
    """One switch with several values; `{}` in the words is the value."""
    return lambda bench: (Try(value, {name: value}, words.format(value)) for value in values)


NORMS = ("attn_norm", "ffn_norm", "final_norm")
HEAD_NORMS = ("q_norm", "k_norm")
ROPE = ("q_post_rope", "k_post_rope")
GATES, UPS = ("ffn_gate", "moe_expert_gate"), ("ffn_up", "moe_expert_up")
OUTS = ("ffn_out", "moe_expert_out")
PRODUCTS = ("attn_out", *GATES, *UPS, *OUTS, "moe_router_logits")
MATRICES = ("qkv_matmul", *PRODUCTS)
RESIDUALS = ("post_attn_residual", "post_ffn_residual")
ACTIVATED = ("ffn_silu", "moe_expert_swigl")


# --- norms

_OTHER = {
    "attn_norm": "post_attention_layernorm",
    "ffn_norm": "input_layernorm",
    "q_norm": "k_norm",
    "k_norm": "q_norm",
}


def _eps(bench: Bench) -> Iterator[Try]:
    for eps in fits.epsilons(bench):
        yield Try(eps, {"eps": eps}, f"eps = {eps:g} (the config says {bench.settings['eps']:g})")


def _other_norm(bench: Bench) -> Iterator[Try]:
    field = _OTHER[bench.stage]
    yield Try(field, {"w": {bench.row.params[0]: lambda get: get(field)}}, f"the weight of {field} in its place")


def _neighbour(bench: Bench) -> Iterator[Try]:
    """A weight of another layer, the nearest ones first."""
    if bench.layer is None:
        return
    count = bench.config.num_hidden_layers
    for layer in dict.fromkeys((bench.layer + 1, bench.layer - 1, 0, count - 1, *range(min(count, 8)))):
        if not 0 <= layer < count or layer == bench.layer:
            continue
        for field in bench.row.params:
            if bench.has(field, layer):
                pick: Pick = lambda get, field=field, layer=layer: get(field, layer)  # noqa: E731
                yield Try(field, {"w": {field: pick}}, f"{field} of layer {layer} in place of layer {bench.layer}")


# --- projections


def _order(bench: Bench) -> Iterator[Try]:
    for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
        yield Try(order, {"order": order}, f"q, k and v are computed with the matrices of {', '.join(order)}")


def _bias(bench: Bench, times: int) -> Iterator[Try]:
    for parts in ("qkv", "q", "k", "v", "qk", "qv"):
        words = f"the bias of {', '.join(parts)} is {'missing' if times == 0 else 'added twice'}"
        yield Try(parts, {"times": dict.fromkeys(parts, times)}, words)


def _transposed(bench: Bench) -> Iterator[Try]:
    for field in bench.row.params:
        pick: Pick = lambda get, field=field: (m := get(field)).reshape(m.shape[::-1]).T  # noqa: E731
        yield Try(field, {"w": {field: pick}}, f"{field} is read as [in, out], its rows as columns")


def _bits(bench: Bench) -> Iterator[Try]:
    def misread(matrix: np.ndarray) -> np.ndarray:
        bits = matrix.astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)

    for field in bench.row.params:
        pick: Pick = lambda get, field=field: misread(get(field))  # noqa: E731
        yield Try(field, {"w": {field: pick}}, f"the bfloat16 values of {field} are read as float16")


def _permuted(bench: Bench) -> Iterator[Try]:
    """Rows of each head taken in turns from its halves (as for Llama), the other way round, or heads exchanged."""
    h, fields = bench.config.head_dim, bench.row.params
    for field in (f for f in fields if f in ("q_proj", "k_proj")):
        for words, shape in (("turns", (-1, 2, h // 2)), ("halves", (-1, h // 2, 2))):

            def pick(get: Get, field: str = field, shape: tuple[int, int, int] = shape) -> np.ndarray:
                matrix = get(field)
                return matrix.reshape(*shape, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)

            yield Try(
                field, {"w": {field: pick}}, f"the rows of each head of {field} lie in {words}, as in Llama's GGUF"
            )
    for field, order in fits.head_orders(bench):

        def heads(get: Get, field: str = field, order: np.ndarray = order) -> np.ndarray:
            matrix = get(field)
            return matrix.reshape(len(order), -1, matrix.shape[-1])[order].reshape(matrix.shape)

        moved = [int(i) for i in np.flatnonzero(order != np.arange(len(order)))]
        yield Try(field, {"w": {field: heads}}, f"heads {moved} of {field} stand in another order: {order.tolist()}")


def _exchanged(pairs: dict[str, str]) -> Tries:
    def tries(bench: Bench) -> Iterator[Try]:
        (field,) = bench.row.params
        other = pairs[field]
        yield Try(None, {"w": {field: lambda get: get(other)}}, f"{other} in place of {field}")

    return tries


def _head_order(bench: Bench) -> Iterator[Try]:
    x, h = bench.x[0], bench.config.head_dim
    by_head = x.reshape(len(x), -1, h)
    turned = {"reversed": by_head[:, ::-1], "transposed": by_head.swapaxes(1, 2)}
    K = bench.config.num_key_value_heads
    turned["kv-major"] = by_head.reshape(len(x), K, -1, h).swapaxes(1, 2)
    for name, value in turned.items():
        yield Try(name, {"x": {0: value.reshape(x.shape)}}, f"o_proj reads the heads {name}")


def _same_for_all(bench: Bench) -> Iterator[Try]:
    plus = fits.common_offset(bench)
    if plus is not None:
        yield Try(None, {"plus": plus}, "the same vector is added at every token, as a bias would be")


# --- RoPE


def _theta(bench: Bench) -> Iterator[Try]:
    for theta in fits.thetas(bench):
        yield Try(
            theta, {"theta": theta}, f"rope_theta = {theta:.10g} (the config says {bench.settings['theta']:.10g})"
        )


def _stretch(bench: Bench) -> Iterator[Try]:
    for factor in fits.stretches(bench):
        yield Try(factor, {"stretch": factor}, f"positions are divided by {factor:.6g} (linear scaling)")


def _yarn(doubled: bool) -> Tries:
    def tries(bench: Bench) -> Iterator[Try]:
        scaling = bench.settings["scaling"]
        if scaling is None or scaling.rope_type != "yarn":
            return
        plain, turned = fits.frequencies(bench, None), fits.frequencies(bench, scaling)
        twice, magnitude = turned * turned / plain, scaling.attention_factor
        if not doubled:
            yield Try(None, {"scaling": None}, "YaRN is not applied")
            yield Try("frequencies", {"frequencies": plain}, "YaRN's frequencies are not applied")
            yield Try("attention_factor", {"magnitude": 1.0}, "YaRN's attention factor is not applied")
            return
        yield Try(None, {"frequencies": twice, "magnitude": magnitude**2}, "YaRN is applied twice")
        yield Try("frequencies", {"frequencies": twice}, "YaRN's frequencies are applied twice")
        yield Try("attention_factor", {"magnitude": magnitude**2}, "YaRN's attention factor is applied twice")

    return tries


def _before_norm(bench: Bench) -> Iterator[Try]:
    part = bench.stage[0]
    config, field = bench.config, f"{part}_norm"
    raw = bench.value("qkv_bias" if config.qkv_bias else "qkv_matmul") if config.qk_norm else None
    if raw is None:
        return
    weight, eps = bench.tensor(field), config.rms_norm_eps

    def after(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight

    start = 0 if part == "q" else config.q_width
    yield Try(None, {"raw": raw, "raw_start": start, "after": after}, "it is rotated before the head norm, not after")


# --- attention


def _scales(bench: Bench) -> dict[str, tuple[float, str]]:
    config = bench.config
    H, h = config.num_attention_heads, config.head_dim
    return {
        "scores_unscaled": (1.0, "the scores are not divided by √h"),
        "scores_model_dim": (
            (config.hidden_size / H) ** -0.5,
            f"they are scaled by 1/√(D/H), D/H = {config.hidden_size / H:g}",
        ),
        "scores_head_dim": (1.0 / h, "they are scaled by 1/h, not 1/√h"),
    }


def _scale(name: str) -> Tries:
    def tries(bench: Bench) -> Iterator[Try]:
        scale, words = _scales(bench)[name]
        if scale != bench.config.head_dim**-0.5:
            yield Try(None, {"scale": scale}, words)

    return tries


def _kv_map(kind: str) -> Tries:
    def tries(bench: Bench) -> Iterator[Try]:
        H, K = bench.config.num_attention_heads, bench.config.num_key_value_heads
        head, group = np.arange(H), np.arange(H) // (H // K)
        maps = {"modulo": (head % K, "h % K"), "reversed": (K - 1 - group, "K-1-h//G"), "first": (0 * head, "always 0")}
        kv_map, words = maps[kind]
        if not np.array_equal(kv_map, group):
            yield Try(kind, {"kv_map": kv_map}, f"query head h reads kv head {words}, not h // G")

    return tries


def _window(bench: Bench) -> Iterator[Try]:
    if bench.settings["window"] is not None:
        yield Try("none", {"window": None}, f"no sliding window (the config says {bench.settings['window']})")
    for window in fits.windows(bench):
        yield Try(
            window, {"window": window}, f"a sliding window of {window} (the config says {bench.settings['window']})"
        )


# --- residuals, activations


def _normed(bench: Bench) -> Iterator[Try]:
    normed = bench.value("attn_norm" if bench.stage == "post_attn_residual" else "ffn_norm")
    if normed is not None:
        yield Try(None, {"x": {0: normed}}, "the branch is added to the normed state, not to the hidden one")


def _on_product(bench: Bench) -> Iterator[Try]:
    switches = {"on_product": True}
    if bench.stage == "ffn_swigl":
        gate = bench.value("ffn_gate")
        if gate is None:
            return
        switches = {"gate": gate}
    yield Try(None, switches, "silu(gate·up) in place of silu(gate)·up")


# --- experts, embedding, head


def _renormalise(wanted: bool) -> Tries:
    def tries(bench: Bench) -> Iterator[Try]:
        if bench.settings["renormalise"] is not wanted:
            words = "they are renormalised, norm_topk_prob is false" if wanted else "they are not renormalised"
            yield Try(None, {"renormalise": wanted}, words)

    return tries


def _count(bench: Bench) -> Iterator[Try]:
    count = bench.engine.shape[1]
    if count != bench.settings["count"]:
        yield Try(
            count, {"count": count}, f"{count} experts a token (num_experts_per_tok is {bench.settings['count']})"
        )


def _lost(bench: Bench) -> Iterator[Try]:
    for rank in range(bench.config.num_experts_per_tok):
        yield Try(rank, {"lost": rank}, f"the output of the expert of rank {rank} is not added")


def _times(bench: Bench) -> Iterator[Try]:
    for factor in fits.factors(bench):
        yield Try(factor, {"times": factor}, f"multiplied by {factor:.6g}")


def _shifted(bench: Bench) -> Iterator[Try]:
    tokens, size = np.asarray(bench.replay.engine.tokens), bench.config.vocab_size
    for step in (1, -1):
        rows = bench.replay.engine.checkpoint.embedding_rows((tokens[list(bench.case.positions)] + step) % size)
        yield Try(step, {"rows": np.asarray(rows, np.float64)}, f"the row of token id {step:+d} is taken")


def _tied(bench: Bench) -> Iterator[Try]:
    if not bench.config.tie_word_embeddings:
        words = "the embedding is used as the head, and the model has a head of its own"
        yield Try(None, {"w": {"head": lambda get: get("embed_tokens")}}, words)


def _unnormed(bench: Bench) -> Iterator[Try]:
    hidden = bench.value("post_ffn_residual", bench.config.num_hidden_layers - 1)
    if hidden is not None:
        yield Try(None, {"x": {0: hidden}}, "the head reads the hidden state without the final norm")


def _shift_experts(bench: Bench) -> Iterator[Try]:
    for shift in (1, -1):
        yield Try(shift, {"shift": shift}, f"the expert with id {shift:+d} is run")


HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis("embedding_scaled", ("embedding",), _times),
    Hypothesis("embedding_shifted", ("embedding",), _shifted),
    Hypothesis("norm_eps", NORMS + HEAD_NORMS, _eps, generic=True),
    Hypothesis("layer_norm", NORMS + HEAD_NORMS, _switch("LayerNorm: the mean is subtracted", centre=True)),
    Hypothesis("norm_weight_missing", NORMS, _switch("its weight is not applied", unweighted=True)),
    Hypothesis("norm_weight_other", ("attn_norm", "ffn_norm"), _other_norm),
    Hypothesis("norm_weight_neighbour", ("attn_norm", "ffn_norm"), _neighbour),
    Hypothesis("norm_one_plus_w", NORMS + HEAD_NORMS, _switch("the weight is 1 + w, as in Gemma", plus_one=True)),
    Hypothesis("norm_missing", ("attn_norm", "ffn_norm"), _switch("the hidden state is not normed", skip=True)),
    Hypothesis("final_norm_missing", ("final_norm",), _switch("the hidden state is not normed", skip=True)),
    Hypothesis("final_norm_missing", ("lm_head",), _unnormed),
    Hypothesis("head_norm_missing", HEAD_NORMS, _switch("there is no norm of heads", skip=True)),
    Hypothesis("head_norm_row", HEAD_NORMS, _switch("the norm is over the whole row, not over each head", row=True)),
    Hypothesis("head_norm_swapped", HEAD_NORMS, _other_norm),
    Hypothesis("qkv_order", ("qkv_matmul",), _order),
    Hypothesis("bias_missing", ("qkv_bias",), lambda bench: _bias(bench, 0)),
    Hypothesis("bias_q_only", ("qkv_bias",), _switch("only q gets its bias", times={"k": 0, "v": 0})),
    Hypothesis("bias_doubled", ("qkv_bias",), lambda bench: _bias(bench, 2)),
    Hypothesis("weight_transposed", (*MATRICES, "lm_head"), _transposed),
    Hypothesis("weight_permuted", ("qkv_matmul",), _permuted),
    Hypothesis("weight_neighbour", MATRICES, _neighbour),
    Hypothesis("weight_dtype", MATRICES, _bits),
    Hypothesis("rope_missing", ROPE, _switch("it is not rotated", skip=True)),
    Hypothesis(
        "rope_interleaved", ROPE, _switch("neighbours are rotated, not dimension i with i + h/2", interleaved=True)
    ),
    Hypothesis("rope_theta", ROPE, _theta),
    Hypothesis("rope_positions", ROPE, _each("positions are off by {:+d}", "offset", *(n for n in range(-4, 5) if n))),
    Hypothesis("rope_reversed", ROPE, _switch("it is rotated the other way round", sign=-1)),
    Hypothesis("rope_before_norm", ROPE, _before_norm),
    Hypothesis("rope_linear", ROPE, _stretch),
    Hypothesis(
        "rope_partial", ROPE, _each("only the first {:.0%} of each head is rotated", "partial", 0.5, 0.25, 0.75)
    ),
    Hypothesis("yarn_missing", ROPE, _yarn(doubled=False)),
    Hypothesis("yarn_doubled", ROPE, _yarn(doubled=True)),
    Hypothesis("rope_half_tables", ROPE, _switch("cos and sin are rounded to float16", tables=np.float16)),
    *(
        Hypothesis(name, ("attn_scores",), _scale(name))
        for name in ("scores_unscaled", "scores_model_dim", "scores_head_dim")
    ),
    *(Hypothesis(f"kv_heads_{kind}", ("attn_scores",), _kv_map(kind)) for kind in ("modulo", "reversed", "first")),
    Hypothesis("mask_missing", ("attn_softmax",), _switch("there is no causal mask", unmasked=True)),
    Hypothesis("mask_strict", ("attn_softmax",), _switch("a query does not see itself", nearest=1)),
    Hypothesis("mask_ahead", ("attn_softmax",), _switch("a query sees one key ahead", nearest=-1)),
    Hypothesis("window", ("attn_softmax",), _window),
    Hypothesis(
        "softmax_query_axis", ("attn_softmax",), _switch("it sums to one over queries, not keys", over_queries=True)
    ),
    Hypothesis("softmax_masked_after", ("attn_softmax",), _switch("it is masked after normalising", masked_after=True)),
    *(Hypothesis(f"v_heads_{kind}", ("attention",), _kv_map(kind)) for kind in ("modulo", "reversed", "first")),
    Hypothesis("o_proj_head_order", ("attn_out",), _head_order),
    Hypothesis("o_proj_bias", ("attn_out",), _same_for_all, generic=True),
    Hypothesis("residual_missing", RESIDUALS, _switch("the hidden state is not added", first=0)),
    Hypothesis("residual_doubled", RESIDUALS, _switch("the hidden state is added twice", first=2)),
    Hypothesis("residual_doubled", RESIDUALS, _switch("the branch is added twice", "branch", second=2)),
    Hypothesis("branch_missing", RESIDUALS, _switch("the branch is not added", second=0)),
    Hypothesis("residual_normed", RESIDUALS, _normed),
    Hypothesis("gate_up_swapped", ("ffn_gate", "ffn_up"), _exchanged({"gate_proj": "up_proj", "up_proj": "gate_proj"})),
    Hypothesis("gelu_tanh", ACTIVATED, _switch("GELU (tanh) in place of SiLU", activation="gelu_tanh")),
    Hypothesis("gelu_erf", ACTIVATED, _switch("GELU (erf) in place of SiLU", activation="gelu_erf")),
    Hypothesis("silu_missing", ACTIVATED, _switch("there is no activation", activation="none")),
    Hypothesis("silu_missing", ACTIVATED, _switch("ReLU in place of SiLU", "relu", activation="relu")),
    Hypothesis("silu_on_product", ("ffn_swigl", "moe_expert_swigl"), _on_product),
    Hypothesis("gate_up_swapped", ("moe_expert_swigl",), _switch("silu(up)·gate", "activation", exchanged=True)),
    Hypothesis("router_not_renormalised", ("moe_router",), _renormalise(False)),
    Hypothesis("router_renormalised", ("moe_router",), _renormalise(True)),
    Hypothesis("router_count", ("moe_router",), _count),
    Hypothesis("router_sigmoid", ("moe_router",), _switch("sigmoid in place of softmax", kind="sigmoid")),
    Hypothesis("router_softmax_after", ("moe_router",), _switch("the softmax is over the chosen alone", kind="after")),
    Hypothesis("router_half", ("moe_router_logits",), _switch("logits are rounded to float16", stored=np.float16)),
    Hypothesis("router_half", ("moe_router",), _switch("logits are rounded to float16", logits=np.float16)),
    Hypothesis("experts_off_by_one", ("moe_expert_gate", "moe_expert_up", "moe_expert_out"), _shift_experts),
    Hypothesis(
        "expert_gate_up_swapped",
        ("moe_expert_gate", "moe_expert_up"),
        _exchanged({"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    ),
    Hypothesis("moe_weights_twice", ("moe_ffn_out",), _switch("an expert's weight is applied twice", power=2)),
    Hypothesis("moe_weights_missing", ("moe_ffn_out",), _switch("experts are added without their weights", power=0)),
    Hypothesis(
        "moe_weights_order",
        ("moe_ffn_out",),
        _switch("the weights go to the experts in reversed order", backwards=True),
    ),
    Hypothesis("moe_expert_lost", ("moe_ffn_out",), _lost),
    Hypothesis("head_tied", ("lm_head",), _tied),
    Hypothesis("logits_scaled", ("lm_head",), _times, generic=True),
    Hypothesis("logits_capped", ("lm_head",), _each("capped at {:g} by tanh", "cap", 30.0, 50.0, 20.0, 15.0)),
    Hypothesis("scaled", (*PRODUCTS,), _times, generic=True),
)


def about(stage: str) -> list[Hypothesis]:
    """The rows about one stage."""
    return [row for row in HYPOTHESES if stage in row.stages]
