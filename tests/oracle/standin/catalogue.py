"""The faults that the stand-in can be told to have: where each one shows, and what explains it."""

from __future__ import annotations

from typing import Any

from tests.oracle.standin import catalogue_engines, catalogue_more
from tests.oracle.standin.planted import Planted, hint, row

BIASED, NORMED, DENSE, MOE = ("qwen2",), ("qwen3", "qwen3_moe"), ("qwen2", "qwen3"), ("qwen3_moe",)
ROPE, HEAD_NORM = "q_post_rope k_post_rope", "q_norm k_norm"
GATE, UP, OUT = "ffn_gate moe_expert_gate", "ffn_up moe_expert_up", "ffn_out moe_expert_out"
ACT, PRODUCT = "ffn_silu moe_expert_swigl", "ffn_swigl moe_expert_swigl"

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
WITH_YARN: dict[str, Any] = {"config": {"rope_parameters": YARN}}
WITH_WINDOW: dict[str, Any] = {"config": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}}
NOT_RENORMALISED: dict[str, Any] = {"config": {"norm_topk_prob": False}}
ONCE: dict[str, Any] = {"per_layer": False}
FLOAT32: dict[str, Any] = {"dtypes": ("float32",)}  # in half precision everybody rounds there

EMBEDDING = [
    row("embedding_scaled/sqrt_d", "embedding", 72**0.5, **ONCE),  # Gemma's
    row("embedding_scaled/2", "embedding", 2.0, **ONCE),
    row("embedding_shifted", "embedding", 1, **ONCE),
]

NORMS = [
    row("norm_eps/attn_norm/0.001", "attn_norm", 1e-3),
    row("norm_eps/ffn_norm/0.001", "ffn_norm", 1e-3),
    row("norm_eps/final_norm/0.01", "final_norm", 1e-2, **ONCE),  # of a mean square of 10
    row("layer_norm/attn_norm", "attn_norm"),
    row("layer_norm/ffn_norm", "ffn_norm"),
    row("layer_norm/final_norm", "final_norm", **ONCE),
    row("norm_weight_missing/attn_norm", "attn_norm"),
    row("norm_weight_missing/ffn_norm", "ffn_norm"),
    row("norm_weight_missing/final_norm", "final_norm", **ONCE),
    row("norm_weight_other/ffn_norm", "ffn_norm", "input_layernorm"),
    row("norm_weight_other/attn_norm", "attn_norm", "post_attention_layernorm"),
    row("norm_weight_neighbour/input_layernorm", "attn_norm", "input_layernorm"),
    row("norm_weight_neighbour/post_attention_layernorm", "ffn_norm", "post_attention_layernorm"),
    row("norm_one_plus_w/attn_norm", "attn_norm"),
    row("norm_one_plus_w/ffn_norm", "ffn_norm"),
    row("norm_one_plus_w/final_norm", "final_norm", **ONCE),
    row("norm_missing/attn_norm", "attn_norm"),
    row("norm_missing/ffn_norm", "ffn_norm"),
    row("final_norm_missing", "final_norm", **ONCE),
    row("final_norm_missing/lm_head", "lm_head", **ONCE),  # normed into its file, but the head reads the hidden state
]

QKV = [
    row("qkv_order/qvk", "qkv_matmul", "qvk"),
    row("qkv_order/kqv", "qkv_matmul", "kqv", config={"num_key_value_heads": 6}),
    row("weight_transposed/q_proj", "qkv_matmul", "q_proj"),
    row("weight_transposed/v_proj", "qkv_matmul", "v_proj"),
    row("weight_permuted/q_proj/halves", "qkv_matmul", "q_proj"),  # as llama.cpp's converter does it for Llama
    row("weight_permuted/k_proj/halves", "qkv_matmul", "k_proj"),
    row("weight_permuted/q_proj/heads", "qkv_matmul", "q_proj"),
    row("weight_neighbour/k_proj", "qkv_matmul", "k_proj"),
    row("weight_dtype/q_proj", "qkv_matmul", "q_proj", weights="bfloat16"),
    row("bias_missing", "qkv_bias", archs=BIASED),
    row("bias_missing/v", "qkv_bias", "v", archs=BIASED),
    row("bias_doubled", "qkv_bias", archs=BIASED),
    row("bias_q_only", "qkv_bias", archs=BIASED),
    row("head_norm_missing", HEAD_NORM, archs=NORMED),
    row("head_norm_row", HEAD_NORM, archs=NORMED),
    row("head_norm_swapped", HEAD_NORM, archs=NORMED),
    row("norm_one_plus_w/head_norm", HEAD_NORM, archs=NORMED),
]

ROTARY = [
    row("rope_interleaved", ROPE),
    row("rope_interleaved/k", "k_post_rope"),
    row("rope_theta/10000", ROPE, 10000.0, config={"rope_theta": 1e6}),
    row("rope_theta/500000", ROPE, 500000.0),
    row("rope_theta/1000000", ROPE, 1e6),
    row("rope_positions/1", ROPE, 1),
    row("rope_positions/-1", ROPE, -1),
    row("rope_positions/3", ROPE, 3),
    row("rope_reversed", ROPE),
    row("rope_before_norm", ROPE, archs=NORMED),  # q_norm and k_norm are written as they should be
    row("rope_linear/4", ROPE, 4.0),
    row("rope_partial/0.5", ROPE, 0.5),
    row("yarn_missing", ROPE, **WITH_YARN),
    row("yarn_doubled", ROPE, **WITH_YARN),
    row("yarn_doubled/frequencies", ROPE, **WITH_YARN),
    row("yarn_doubled/attention_factor", ROPE, **WITH_YARN),
    row("rope_half_tables", ROPE, **FLOAT32),
    row("rope_missing", ROPE),
    row("rope_missing/q", "q_post_rope"),
]

ATTENTION = [
    row("scores_unscaled", "attn_scores"),
    row("scores_model_dim", "attn_scores"),
    row("scores_head_dim", "attn_scores"),
    row("kv_heads_modulo", "attn_scores"),
    row("kv_heads_reversed", "attn_scores"),
    row("mask_missing", "attn_softmax"),
    row("mask_strict", "attn_softmax"),
    row("mask_ahead", "attn_softmax"),
    row("window/5", "attn_softmax", 5),
    row("window/none", "attn_softmax", "none", **WITH_WINDOW),
    row("softmax_query_axis", "attn_softmax"),
    row("softmax_masked_after", "attn_softmax"),
    row("v_heads_modulo", "attention"),
    row("v_heads_reversed", "attention"),
    row("o_proj_head_order/reversed", "attn_out", "reversed"),
    row("o_proj_head_order/transposed", "attn_out", "transposed"),
    row("o_proj_bias/random", "attn_out"),
    row("weight_transposed/o_proj", "attn_out", "o_proj"),
    row("weight_neighbour/o_proj", "attn_out", "o_proj"),
    row("weight_dtype/o_proj", "attn_out", "o_proj", weights="bfloat16"),
]

RESIDUALS = [
    row("residual_missing/post_attn_residual", "post_attn_residual"),
    row("residual_missing/post_ffn_residual", "post_ffn_residual"),
    row("residual_doubled/post_attn_residual", "post_attn_residual"),
    row("residual_doubled/post_ffn_residual", "post_ffn_residual"),
    row("residual_normed/post_attn_residual", "post_attn_residual"),
    row("residual_normed/post_ffn_residual", "post_ffn_residual"),
]

FEED_FORWARD = [
    row("gate_up_swapped", "ffn_gate ffn_up", archs=DENSE),
    row("gelu_tanh", ACT),
    row("gelu_erf", ACT),
    row("silu_missing", ACT),
    row("silu_missing/relu", ACT, "relu"),
    row("silu_on_product", PRODUCT),
    row("weight_transposed/down_proj", OUT, "down_proj"),
    row("weight_transposed/gate_proj", GATE, "gate_proj"),
    row("weight_neighbour/gate_proj", GATE, "gate_proj"),
    row("weight_neighbour/down_proj", OUT, "down_proj"),
    row("weight_dtype/up_proj", UP, "up_proj", weights="bfloat16"),
]

EXPERTS = [
    row("router_not_renormalised", "moe_router", archs=MOE),
    row("router_renormalised", "moe_router", archs=MOE, **NOT_RENORMALISED),
    row("router_count/1", "moe_router moe_router_indices", 1, archs=MOE),  # the experts' stages have that size too
    row("router_count/3", "moe_router moe_router_indices", 3, archs=MOE),
    row("router_sigmoid", "moe_router", archs=MOE),
    row("router_softmax_after", "moe_router", archs=MOE, **NOT_RENORMALISED),
    row("router_half", "moe_router_logits", archs=MOE, **FLOAT32),
    row("weight_neighbour/gate", "moe_router_logits", "gate", archs=MOE),
    row("experts_off_by_one", "moe_expert_gate moe_expert_up moe_expert_out", 1, archs=MOE),
    row("expert_gate_up_swapped", "moe_expert_gate moe_expert_up", archs=MOE),
    row("moe_weights_twice", "moe_ffn_out", archs=MOE),
    row("moe_weights_order", "moe_ffn_out", archs=MOE),
    row("moe_expert_lost/1", "moe_ffn_out", 1, archs=MOE),
]

HEAD = [
    row("head_tied", "lm_head", **ONCE),
    row("logits_scaled/0.5", "lm_head", 0.5, **ONCE),
    row("logits_capped/30", "lm_head", 30.0, **ONCE),  # Gemma's
]

HINTS = [
    hint("head_scaled/attention"),
    hint("noise/ffn_up", archs=DENSE),
    hint("noise/moe_expert_up", archs=MOE),
    hint("saturation/qkv_matmul/2"),
    hint("token_zeroed/attention"),
    hint("token_zeroed/ffn_norm", archs=DENSE),  # a router cannot choose among zeros, nor NaNs
    hint("channel_offset/attn_out"),
    hint("nan_value/ffn_up", archs=DENSE),
    hint("nan_value/attn_out", archs=DENSE),
    hint("nan_value/moe_expert_up", archs=MOE),
]

# Weak ones, and other readings of a fault's name: not what an explanation is measured by.
MORE = [
    row("norm_eps/attn_norm/1e-05", "attn_norm", 1e-5),
    row("residual_doubled/post_attn_residual/branch", "post_attn_residual"),
    row("residual_doubled/post_ffn_residual/branch", "post_ffn_residual"),
    row("o_proj_bias/q_bias", "attn_out", "q_bias", archs=BIASED),
    row("router_half/moe_router", "moe_router", archs=MOE, **FLOAT32),  # written in float32, chosen by in float16
]


def _table(*groups: list[Planted]) -> dict[str, Planted]:
    return {planted.name: planted for group in groups for planted in group}


GROUPS = (EMBEDDING, NORMS, QKV, ROTARY, ATTENTION, RESIDUALS, FEED_FORWARD, EXPERTS, HEAD, HINTS)
FAULTS = _table(*GROUPS, *catalogue_more.GROUPS, *catalogue_engines.GROUPS)
EXTRAS = _table(MORE)
