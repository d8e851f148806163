"""THE table of hypotheses: what engines get wrong, at which stages; `tries*.py` have how each is tried."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxref.stages import STAGES
from oracle import tries
from oracle import tries_attention as attention
from oracle import tries_bias as biases
from oracle import tries_cache as cache
from oracle import tries_ends as ends
from oracle import tries_experts as experts
from oracle import tries_fused as fused
from oracle import tries_inputs as inputs
from oracle import tries_masks as masks
from oracle import tries_norms as norms
from oracle import tries_overflow as overflow
from oracle import tries_packed as packed
from oracle import tries_rounded as bits
from oracle import tries_rows as rows
from oracle import tries_sums as sums
from oracle.tries import each, switch


@dataclass(frozen=True)
class Hypothesis:
    """One row. A generic one (a fitted scale) counts only where no specific one fits."""

    name: str
    stages: tuple[str, ...]
    tries: tries.Tries
    generic: bool = False


NORMS = ("attn_norm", "ffn_norm", "final_norm")
HEAD_NORMS = ("q_norm", "k_norm")
ALL_NORMS = NORMS + HEAD_NORMS
ROPE = ("q_post_rope", "k_post_rope")
GATES, UPS = ("ffn_gate", "moe_expert_gate"), ("ffn_up", "moe_expert_up")
OUTS = ("ffn_out", "moe_expert_out")
PRODUCTS = ("attn_out", *GATES, *UPS, *OUTS, "moe_router_logits")
MATRICES = ("qkv_matmul", *PRODUCTS)
RESIDUALS = ("post_attn_residual", "post_ffn_residual")
ACTIVATED, GATED = ("ffn_silu", "moe_expert_swigl"), ("ffn_swigl", "moe_expert_swigl")
SCORED = ("attn_scores", "attn_softmax")
READERS = tuple(name for name in STAGES if name not in ("embedding", "attn_softmax", "moe_router_indices"))
SWAPPED = {"gate_proj": "up_proj", "up_proj": "gate_proj"}


HYPOTHESES: tuple[Hypothesis, ...] = (
    Hypothesis("embedding_scaled", ("embedding",), tries.times),
    Hypothesis("embedding_shifted", ("embedding",), ends.shifted),
    Hypothesis("embedding_tokens", ("embedding",), inputs.tokens),
    Hypothesis("norm_eps", ALL_NORMS, tries.eps, generic=True),
    Hypothesis(
        "eps_outside", ALL_NORMS, switch("eps is added to the root: x / (√mean(x²) + eps)", "root", outside="root")
    ),
    Hypothesis(
        "eps_outside",
        ALL_NORMS,
        switch("eps is added to the reciprocal root: x · (1/√mean(x²) + eps)", "reciprocal", outside="reciprocal"),
    ),
    Hypothesis("layer_norm", ALL_NORMS, switch("LayerNorm: the mean is subtracted", centre=True)),
    Hypothesis("norm_sum", ALL_NORMS, switch("the sum of squares in place of their mean", size="sum")),
    Hypothesis(
        "norm_absolute",
        ALL_NORMS,
        switch("the mean absolute value in place of the root of the mean square", size="absolute"),
    ),
    Hypothesis("norm_unrooted", ALL_NORMS, switch("the mean square without its root", size="unrooted")),
    Hypothesis("norm_size_other", ALL_NORMS, norms.sizes),
    Hypothesis("norm_partial", NORMS, norms.counted),
    Hypothesis("norm_overflow", ALL_NORMS, overflow.squares),
    Hypothesis("norm_rounded", ALL_NORMS, norms.unit),
    Hypothesis("norm_weight_first", ALL_NORMS, switch("its weight is applied before the norm", weight_first=True)),
    Hypothesis("norm_weight_missing", ALL_NORMS, switch("its weight is not applied", power=0)),
    Hypothesis("norm_weight_twice", ALL_NORMS, switch("its weight is applied twice", power=2)),
    Hypothesis("norm_weight_other", NORMS, tries.other_norm),
    Hypothesis("norm_weight_neighbour", ("attn_norm", "ffn_norm", *HEAD_NORMS), tries.neighbour),
    Hypothesis("norm_one_plus_w", ALL_NORMS, switch("the weight is 1 + w, as in Gemma", plus_one=True)),
    Hypothesis("norm_missing", ("attn_norm", "ffn_norm"), switch("the hidden state is not normed", skip=True)),
    Hypothesis("final_norm_missing", ("final_norm",), switch("the hidden state is not normed", skip=True)),
    Hypothesis("final_norm_missing", ("lm_head",), ends.unnormed),
    Hypothesis("head_norm_missing", HEAD_NORMS, switch("there is no norm of heads", skip=True)),
    Hypothesis("head_norm_row", HEAD_NORMS, switch("the norm is over the whole row, not over each head", row=True)),
    Hypothesis("head_norm_halves", HEAD_NORMS, switch("the norm is over each half of a head", halves=True)),
    Hypothesis("head_norm_swapped", HEAD_NORMS, tries.other_norm),
    Hypothesis("head_norm_permuted", HEAD_NORMS, biases.head_norm_permuted),
    Hypothesis("qkv_grouped", ("qkv_matmul",), fused.grouped),
    Hypothesis("qkv_order", ("qkv_matmul",), tries.order),
    Hypothesis("bias_missing", ("qkv_bias",), lambda bench: tries.bias(bench, 0)),
    Hypothesis("bias_q_only", ("qkv_bias",), switch("only q gets its bias", times={"k": 0, "v": 0})),
    Hypothesis("bias_doubled", ("qkv_bias",), lambda bench: tries.bias(bench, 2)),
    Hypothesis("bias_sign", ("qkv_bias",), lambda bench: tries.bias(bench, -1)),
    Hypothesis("bias_exchanged", ("qkv_bias",), biases.exchanged),
    Hypothesis("bias_first_alone", ("qkv_bias",), biases.first_alone),
    Hypothesis("bias_permuted", ("qkv_bias",), biases.permuted),
    Hypothesis("bias_neighbour", ("qkv_bias",), biases.neighbour),
    Hypothesis("weight_transposed", (*MATRICES, "lm_head"), tries.transposed),
    Hypothesis("weight_permuted", ("qkv_matmul",), tries.permuted),
    Hypothesis("weight_nibbles", ("embedding", *MATRICES, "lm_head"), packed.nibbles),
    Hypothesis("weight_unpacked", ("embedding", *MATRICES, "lm_head"), packed.misread),
    Hypothesis("weight_neighbour", MATRICES, tries.neighbour),
    Hypothesis("weight_dtype", MATRICES, tries.bits),
    Hypothesis("partial_sum", MATRICES, sums.partial_sum),
    Hypothesis("qkv_scaled", ("qkv_matmul", "qkv_bias"), tries.part_times, generic=True),
    Hypothesis("rope_missing", ROPE, switch("it is not rotated", skip=True)),
    Hypothesis(
        "rope_interleaved", ROPE, switch("neighbours are rotated, not dimension i with i + h/2", interleaved=True)
    ),
    Hypothesis("rope_theta", ROPE, attention.theta),
    Hypothesis("rope_half_positions", ROPE, attention.half_positions),
    Hypothesis("rope_positions", ROPE, attention.positions),
    Hypothesis("rope_doubled", ROPE, attention.doubled),
    Hypothesis("rope_reversed", ROPE, switch("it is rotated the other way round", sign=-1)),
    Hypothesis("rope_before_norm", ROPE, attention.before_norm),
    Hypothesis("rope_linear", ROPE, attention.stretch),
    Hypothesis("rope_partial", ROPE, each("only the first {:.0%} of each head is rotated", "partial", 0.5, 0.25, 0.75)),
    Hypothesis("yarn_missing", ROPE, attention.yarn(doubled=False)),
    Hypothesis("yarn_doubled", ROPE, attention.yarn(doubled=True)),
    Hypothesis("yarn_other", ROPE, attention.yarn_other),
    Hypothesis("rope_llama3", ROPE, attention.llama3),
    Hypothesis("rope_half_tables", ROPE, each("cos and sin are rounded to {}", "tables", *bits.HALF)),
    Hypothesis("rope_half_frequencies", ROPE, each("frequencies are rounded to {}", "kept", *bits.HALF)),
    Hypothesis("rope_half_angles", ROPE, attention.half_angles),
    Hypothesis("rope_exchanged", ROPE, switch("cos and sin are exchanged", exchanged=True)),
    Hypothesis("rope_in_place", ROPE, switch("the second of a pair is made of the first one turned", in_place=True)),
    Hypothesis("rope_first_head", ROPE, switch("only the first head is rotated", first=1)),
    Hypothesis("rope_by_head", ROPE, switch("the head's number is taken for the position", by_head=True)),
    Hypothesis("rope_scaled", ROPE, tries.times, generic=True),
    *(
        Hypothesis(name, ("attn_scores",), attention.scale(name))
        for name in ("scores_unscaled", "scores_model_dim", "scores_head_dim", "scores_hidden_dim")
    ),
    Hypothesis("scores_capped", SCORED, each("scores are capped at {:g} by tanh", "cap", 50.0, 30.0, 20.0)),
    Hypothesis("scores_scaled", ("attn_scores",), tries.times, generic=True),
    *(
        Hypothesis(f"kv_heads_{kind}", ("attn_scores",), attention.kv_map(kind))
        for kind in ("modulo", "reversed", "first", "next", "previous")
    ),
    Hypothesis("kv_heads_other", ("attn_scores",), attention.kv_fitted, generic=True),
    Hypothesis("scores_overflow", ("attn_scores",), overflow.products),
    Hypothesis("softmax_overflow", ("attn_softmax",), overflow.powers),
    Hypothesis("mask_missing", ("attn_softmax",), switch("there is no causal mask", unmasked=True)),
    Hypothesis("mask_strict", ("attn_softmax",), switch("a query does not see itself", nearest=1)),
    Hypothesis("mask_ahead", ("attn_softmax",), switch("a query sees one key ahead", nearest=-1)),
    Hypothesis("mask_value", ("attn_softmax",), masks.masked_as),
    *(
        Hypothesis(f"mask_{kind}", ("attn_softmax",), masks.pattern(kind))
        for kind in ("hidden", "tail", "chunks", "documents", "prefix")
    ),
    Hypothesis("mask_other", ("attn_softmax",), masks.other, generic=True),
    Hypothesis("window", ("attn_softmax",), attention.window),
    Hypothesis(
        "softmax_query_axis", ("attn_softmax",), switch("it sums to one over queries, not keys", over_queries=True)
    ),
    Hypothesis("softmax_masked_after", ("attn_softmax",), switch("it is masked after normalising", masked_after=True)),
    Hypothesis("softmax_undivided", ("attn_softmax",), switch("it is not divided by its sum", undivided=True)),
    Hypothesis(
        "softmax_plus_one",
        ("attn_softmax",),
        switch("its sum has one more term, as of a key with the score 0 (off-by-one softmax)", "zero", plus="zero"),
    ),
    Hypothesis(
        "softmax_plus_one",
        ("attn_softmax",),
        switch("1 is added to its sum after the greatest score was subtracted", "greatest", plus="greatest"),
    ),
    Hypothesis("softmax_unrescaled", ("attn_softmax",), masks.unrescaled),
    Hypothesis("softmax_mean", ("attn_softmax",), switch("all keys have the same weight", heat=0.0)),
    Hypothesis("softmax_temperature", ("attn_softmax",), attention.heat, generic=True),
    *(
        Hypothesis(f"v_heads_{kind}", ("attention",), attention.kv_map(kind))
        for kind in ("modulo", "reversed", "first", "next", "previous")
    ),
    Hypothesis("v_heads_other", ("attention",), attention.kv_fitted, generic=True),
    Hypothesis("attention_unmerged", ("attention",), switch("[H, S, h] is taken for [S, H·h]", unmerged=True)),
    Hypothesis("attention_unmerged", ("attention",), switch("it is [S, h, H], not [S, H·h]", "h-major", by_dim=True)),
    Hypothesis("attention_head_order", ("attention",), cache.head_order),
    Hypothesis("v_rotated", ("attention",), cache.values_rotated),
    Hypothesis("kv_cache_shifted", ("attn_scores", "attention"), cache.shifted),
    Hypothesis("heads_untransposed", ("attn_scores", "attention"), cache.untransposed),
    Hypothesis("o_proj_head_order", ("attn_out",), tries.head_order),
    Hypothesis("o_proj_bias", ("attn_out",), tries.same_for_all, generic=True),
    Hypothesis("residual_missing", RESIDUALS, switch("the hidden state is not added", first=0)),
    Hypothesis("residual_doubled", RESIDUALS, switch("the hidden state is added twice", first=2)),
    Hypothesis("residual_doubled", RESIDUALS, switch("the branch is added twice", "branch", second=2)),
    Hypothesis("branch_missing", RESIDUALS, switch("the branch is not added", second=0)),
    Hypothesis("residual_normed", RESIDUALS, tries.normed),
    Hypothesis("residual_scaled", RESIDUALS, tries.branches, generic=True),
    Hypothesis("gate_up_interleaved", (*GATES, *UPS), fused.interleaved),
    Hypothesis("gate_up_swapped", ("ffn_gate", "ffn_up"), tries.exchanged(SWAPPED)),
    Hypothesis("gelu_tanh", ACTIVATED, switch("GELU (tanh) in place of SiLU", activation="gelu_tanh")),
    Hypothesis("gelu_erf", ACTIVATED, switch("GELU (erf) in place of SiLU", activation="gelu_erf")),
    Hypothesis("silu_missing", ACTIVATED, switch("there is no activation", activation="none")),
    Hypothesis("silu_missing", ACTIVATED, switch("ReLU in place of SiLU", "relu", activation="relu")),
    Hypothesis("gelu_quick", ACTIVATED, switch("x·sigmoid(1.702x) in place of SiLU", activation="gelu_quick")),
    Hypothesis("silu_missing", ACTIVATED, switch("sigmoid in place of SiLU", "sigmoid", activation="sigmoid")),
    Hypothesis("silu_missing", ACTIVATED, switch("ReLU² in place of SiLU", "relu_squared", activation="relu_squared")),
    Hypothesis("silu_missing", ACTIVATED, switch("tanh in place of SiLU", "tanh", activation="tanh")),
    Hypothesis("silu_missing", ACTIVATED, switch("hard swish in place of SiLU", "hardswish", activation="hardswish")),
    Hypothesis("silu_overflow", ACTIVATED, overflow.sigmoid),
    Hypothesis("up_missing", GATED, switch("silu(gate) is not multiplied by up", up="missing")),
    Hypothesis("up_added", GATED, switch("silu(gate) + up in place of silu(gate)·up", up="added")),
    Hypothesis("up_plus_one", GATED, switch("silu(gate)·(up + 1), as in GPT-OSS", up="plus_one")),
    Hypothesis("silu_on_both", GATED, switch("silu(gate)·silu(up) in place of silu(gate)·up", both=True)),
    Hypothesis("silu_on_product", GATED, tries.on_product),
    Hypothesis("silu_on_up", ("ffn_silu", "ffn_swigl"), tries.exchanged_gate),
    Hypothesis("silu_on_up", ("moe_expert_swigl",), switch("silu(up)·gate in place of silu(gate)·up", exchanged=True)),
    Hypothesis("router_not_renormalised", ("moe_router",), experts.renormalise(False)),
    Hypothesis("router_renormalised", ("moe_router",), experts.renormalise(True)),
    Hypothesis("router_count", ("moe_router",), experts.count),
    Hypothesis("router_choice", ("moe_router",), experts.chosen),
    Hypothesis("router_sigmoid", ("moe_router",), switch("sigmoid in place of softmax", kind="sigmoid")),
    Hypothesis("router_softmax_after", ("moe_router",), switch("the softmax is over the chosen alone", kind="after")),
    Hypothesis("router_softmax_twice", ("moe_router",), switch("the weights go through a softmax again", kind="twice")),
    Hypothesis("router_equal", ("moe_router",), switch("all chosen experts have the same weight", kind="equal")),
    Hypothesis("router_raw", ("moe_router",), switch("the weights are the logits, without a softmax", kind="raw")),
    Hypothesis("router_half", ("moe_router_logits",), switch("logits are rounded to float16", stored=np.float16)),
    Hypothesis("router_half", ("moe_router",), switch("logits are rounded to float16", logits=np.float16)),
    Hypothesis("experts_off_by_one", ("moe_expert_gate", "moe_expert_up", "moe_expert_out"), experts.shift_experts),
    Hypothesis("expert_gate_up_swapped", ("moe_expert_gate", "moe_expert_up"), tries.exchanged(SWAPPED)),
    Hypothesis("expert_input_weighted", ("moe_expert_gate", "moe_expert_up"), experts.weighted_input),
    Hypothesis("moe_weights_twice", ("moe_ffn_out",), switch("an expert's weight is applied twice", power=2)),
    Hypothesis("moe_weights_missing", ("moe_ffn_out",), switch("experts are added without their weights", power=0)),
    Hypothesis(
        "moe_weights_order", ("moe_ffn_out",), switch("the weights go to the experts in reversed order", backwards=True)
    ),
    Hypothesis("moe_weights_order", ("moe_ffn_out",), experts.rolled),
    Hypothesis("moe_expert_lost", ("moe_ffn_out",), experts.lost),
    Hypothesis("moe_capacity", ("moe_ffn_out",), experts.capacity),
    Hypothesis("head_tied", ("lm_head",), ends.tied),
    Hypothesis("logits_normalised", ("lm_head",), ends.normalised),
    Hypothesis("logits_penalised", ("lm_head",), ends.penalised),
    Hypothesis("logits_rolled", ("lm_head",), ends.rolled),
    Hypothesis("logits_position", ("lm_head",), ends.position),
    Hypothesis("logits_scaled", ("lm_head",), tries.times, generic=True),
    Hypothesis("logits_capped", ("lm_head",), each("capped at {:g} by tanh", "cap", 30.0, 50.0, 20.0, 15.0)),
    Hypothesis("scaled", (*PRODUCTS, "moe_router", "moe_ffn_out"), tries.times, generic=True),
    Hypothesis("input_other", READERS, inputs.other),
    Hypothesis("rows_moved", rows.BY_TOKEN, rows.moved),
    Hypothesis("kv_cache_rounded", ("attn_scores", "attention"), bits.cached),
    Hypothesis("kv_cache_rounded", ("k_post_rope",), bits.int8_result),
    Hypothesis("weight_rounded", ("embedding", *MATRICES, "lm_head", *NORMS, *HEAD_NORMS), bits.weights),
    Hypothesis("input_rounded", (*MATRICES, "lm_head"), bits.inputs),
    Hypothesis("stored_half", tuple(name for name in STAGES if name != "moe_router_indices"), bits.stored),
)


def about(stage: str) -> list[Hypothesis]:
    """The rows about one stage."""
    return [row for row in HYPOTHESES if stage in row.stages]
