"""Faults of the stand-in that a second engine, written apart from the table of hypotheses, brought up."""

from __future__ import annotations

from tests.oracle.standin.planted import Planted, row

NORMED, DENSE, MOE = ("qwen3", "qwen3_moe"), ("qwen2", "qwen3"), ("qwen3_moe",)
ROPE = "q_post_rope k_post_rope"
ACT, PRODUCT = "ffn_silu moe_expert_swigl", "ffn_swigl moe_expert_swigl"
F32 = ("float32",)
K3 = {"config": {"num_key_value_heads": 3}}

ENDS = [
    row("norm_weight_other/final_norm", "final_norm", "model.layers.0.input_layernorm.weight", per_layer=False),
    row("logits_normalised", "lm_head", "log_softmax", per_layer=False),
    row("logits_rolled", "lm_head", 1, per_layer=False),
]

NORMS = [
    row("norm_unrooted/attn_norm", "attn_norm"),
    row("norm_weight_first/ffn_norm", "ffn_norm"),
    row("norm_unrooted/k_norm", "k_norm", archs=NORMED),
    row("head_norm_permuted/q_norm", "q_norm", "turns", archs=NORMED),
]

MATRICES = [
    row("qkv_grouped/flat", "qkv_matmul", "flat"),
    row("gate_up_interleaved/turns", "ffn_gate ffn_up", "turns", archs=DENSE),
    row("gate_up_interleaved/halves", "ffn_gate ffn_up", "halves", archs=DENSE),
    row("weight_transposed/down_proj/columns", "ffn_out moe_expert_out", "down_proj"),
    row("weight_transposed/o_proj/columns", "attn_out", "o_proj"),
    row("input_rounded/o_proj/bfloat16", "attn_out", "bfloat16", dtypes=F32),
    row("input_rounded/down_proj/float16", "ffn_out moe_expert_out", "float16", dtypes=F32),
    row("kv_cache_rounded/v/float8_e4m3fn", "attention", "float8_e4m3fn"),
    row("kv_cache_rounded/k/float8_e5m2", "attn_scores", "float8_e5m2"),
]

ATTENTION = [
    row("rope_exchanged", ROPE),
    row("rope_by_head", ROPE),
    row("rope_scaled/1.25", ROPE, 1.25),
    row("rope_half_tables/bfloat16", ROPE, "bfloat16", dtypes=F32),
    row("rope_half_frequencies/bfloat16", ROPE, "bfloat16", dtypes=F32),
    row("kv_heads_other", "attn_scores", **K3),
    row("v_heads_other", "attention", **K3),
    row("softmax_plus_one", "attn_softmax", "zero"),
    row("mask_value/0", "attn_softmax", 0.0),
    row("mask_value/-10", "attn_softmax", -10.0, dtypes=F32),  # float16 hides it
    row("mask_hidden/2", "attn_softmax", 2),
    row("mask_chunks/8", "attn_softmax", 8),
    row("mask_documents/9", "attn_softmax", 9),
    row("mask_prefix/7", "attn_softmax", 7),
    row("mask_other", "attn_softmax"),
]

FEED_FORWARD = [
    row("residual_scaled/post_attn_residual/0.5", "post_attn_residual"),
    row("residual_scaled/post_ffn_residual/-1", "post_ffn_residual"),
    row("silu_missing/tanh", ACT, "tanh"),
    row("silu_missing/hardswish", ACT, "hardswish"),
    row("up_missing", PRODUCT),
    row("up_added", PRODUCT),
    row("up_plus_one", PRODUCT),
    row("router_softmax_twice", "moe_router", archs=MOE),
    row("router_equal", "moe_router", archs=MOE),
    row("router_raw", "moe_router", archs=MOE),
]

GROUPS: list[list[Planted]] = [ENDS, NORMS, MATRICES, ATTENTION, FEED_FORWARD]
