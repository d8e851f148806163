"""Faults of the stand-in that a second engine, written apart from the table of hypotheses, brought up."""

from __future__ import annotations

from typing import Any

from tests.oracle.standin.planted import Planted, row

NORMED, DENSE, MOE = ("qwen3", "qwen3_moe"), ("qwen2", "qwen3"), ("qwen3_moe",)
ROPE = "q_post_rope k_post_rope"
ACT, PRODUCT = "ffn_silu moe_expert_swigl", "ffn_swigl moe_expert_swigl"
F32, NOT_BF16 = ("float32",), ("float32", "float16")  # bfloat16 rounds as coarsely as int8 does
K3 = {"config": {"num_key_value_heads": 3}}
D64: dict[str, Any] = {"config": {"hidden_size": 64}}
CHOICES = ("smallest", "absolute", "second", "over tokens", "all -1", "ascending", "by id")
SIXTEEN: dict[str, Any] = {"num_experts": 16}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}

QUANTISED = [
    row("weight_rounded/o_proj/Q8_0", "attn_out", "Q8_0", dtypes=NOT_BF16),
    row("weight_rounded/o_proj/Q8_0 both", "attn_out", "Q8_0 both", dtypes=NOT_BF16),
    row("weight_rounded/o_proj/Q4_0", "attn_out", "Q4_0"),
    row("weight_rounded/down_proj/int8", "ffn_out moe_expert_out", "int8", dtypes=NOT_BF16),
    row("weight_rounded/down_proj/int8 both", "ffn_out moe_expert_out", "int8 both", dtypes=NOT_BF16),
    row("weight_rounded/gate_proj/float8_e4m3fn", "ffn_gate moe_expert_gate", "float8_e4m3fn"),
    row("weight_rounded/up_proj/float8_e4m3fn rows", "ffn_up moe_expert_up", "float8_e4m3fn rows"),
    row("input_rounded/o_proj/Q8_0", "attn_out", "Q8_0", dtypes=NOT_BF16),
    row("input_rounded/gate_proj/float8_e4m3fn tensor", "ffn_gate", "float8_e4m3fn tensor", archs=DENSE),
]

SUMS = [
    row("partial_sum/o_proj/half", "attn_out"),
    row("partial_sum/down_proj/quarter", "ffn_out moe_expert_out"),
    row("partial_sum/gate_proj/64", "ffn_gate moe_expert_gate", 64),
    row("qkv_scaled/q", "qkv_matmul", "q 0.25"),
]

CACHE = [
    row("v_rotated", "attention"),
    row("kv_cache_shifted/k/1", "attn_scores", "+1"),
    row("kv_cache_shifted/v/-1 zeros", "attention", "-1 and zeros"),
    row("attention_head_order/reversed", "attention", "reversed"),
    row("attention_head_order/other", "attention", "other"),
    row("attention_unmerged/h-major", "attention", "h-major"),
    row("yarn_other/4", ROPE, 4.0),
    row("rope_llama3/8", ROPE, 8.0, dtypes=NOT_BF16),  # too little for bfloat16 at 23 tokens
    row("rope_llama3/32", ROPE, 32.0, dtypes=NOT_BF16),
    row("yarn_other/8", ROPE, 8.0, config={"rope_parameters": YARN}),
    row("expert_input_weighted", "moe_expert_gate moe_expert_up", archs=MOE),
]

ENDS = [
    row("logits_penalised/1.1", "lm_head", 1.1, per_layer=False),
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
    row("weight_nibbles/qkv/turns of 64", "qkv_matmul", "turns of 64", **D64),
    row("weight_nibbles/v_proj/exchanged of 32", "qkv_matmul", "exchanged of 32 of v_proj", **D64),
    row("weight_nibbles/o_proj/halves of 32", "attn_out", "halves of 32"),
    row("weight_nibbles/gate_proj/turns of 32", "ffn_gate moe_expert_gate", "turns of 32", **D64),
    row("weight_nibbles/embed_tokens/turns of 32", "embedding", "turns of 32", per_layer=False, **D64),
    row("weight_nibbles/lm_head/exchanged of 64", "lm_head", "exchanged of 64", per_layer=False, **D64),
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
    row("rope_half_angles/float16", ROPE, "float16", dtypes=F32),
    row("rope_half_angles/bfloat16 both", ROPE, "bfloat16 both", dtypes=F32),
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
    *(row(f"router_choice/{how}", "moe_router moe_router_indices", how, archs=MOE) for how in CHOICES),
    row("router_choice/+1", "moe_router_indices", "+1", archs=MOE),
    row("router_choice/2 of 4 by 2", "moe_router moe_router_indices", "2 of 4 by 2", archs=MOE, config=SIXTEEN),
]

ROWS = [
    row("rows_moved/ffn_norm/all 0", "ffn_norm", "all 0"),
    row("rows_moved/attn_out/+1", "attn_out", "+1"),
    row("rows_moved/qkv_matmul/-1", "qkv_matmul", "-1"),
    row("rows_moved/ffn_out/reversed", "ffn_out", "reversed", archs=DENSE),
    row("rows_moved/moe_ffn_out/other", "moe_ffn_out", "other", archs=MOE),
    row("rows_moved/post_attn_residual/+1", "post_attn_residual", "+1"),
    row("rows_moved/post_attn_residual.first/+1", "post_attn_residual", "hidden +1"),
    row("rows_moved/post_ffn_residual.second/reversed", "post_ffn_residual", "ffn_out reversed", archs=DENSE),
    row("rows_moved/post_ffn_residual.second/all 0", "post_ffn_residual", "moe_ffn_out all 0", archs=MOE),
    row("rows_moved/attention/other", "attention", "other"),
]

LOOPS = [
    row("norm_rounded/attn_norm/float16", "attn_norm", "float16", dtypes=F32),
    row("norm_rounded/final_norm/bfloat16", "final_norm", "bfloat16", dtypes=F32, per_layer=False),
    row("norm_rounded/k_norm/bfloat16", "k_norm", "bfloat16", dtypes=F32, archs=NORMED),
    row("norm_partial/ffn_norm/64", "ffn_norm", 64),
    row("norm_size_other/attn_norm/first", "attn_norm", "first token"),
    row("norm_size_other/ffn_norm/all", "ffn_norm", "all tokens"),
    row("norm_size_other/q_norm/head", "q_norm", "first head", archs=NORMED),
    row("bias_first_alone/token", "qkv_bias", "token", archs=("qwen2",)),
    row("bias_first_alone/head", "qkv_bias", "qkv head", archs=("qwen2",)),
    row("rope_in_place", ROPE),
    row("rope_first_head", ROPE),
    row("heads_untransposed/q", "attn_scores", "q [S, heads, h]"),
    row("heads_untransposed/k/back", "attn_scores", "k [heads, S, h]"),
    row("heads_untransposed/v", "attention", "v [S, heads, h]"),
    row("heads_untransposed/v/back", "attention", "v [heads, S, h]"),
    row("softmax_unrescaled/4 nothing", "attn_softmax", "4 nothing"),
    row("softmax_unrescaled/8 sum", "attn_softmax", "8 sum"),
    row("softmax_unrescaled/4 output", "attn_softmax", "4 output"),
    row("mask_tail/8", "attn_softmax", 8),
    row("input_other/post_ffn_residual/embedding", "post_ffn_residual", "embedding"),
    row("moe_capacity/4", "moe_ffn_out", 4, archs=MOE),
]

GROUPS: list[list[Planted]] = [QUANTISED, SUMS, CACHE, ENDS, NORMS, MATRICES, ATTENTION, FEED_FORWARD, ROWS, LOOPS]
