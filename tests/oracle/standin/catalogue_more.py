"""More faults of the stand-in: tensors read wrongly, numbers kept in fewer bits, scores, activations, norms, biases."""

from __future__ import annotations

import math

from tests.oracle.standin.planted import Planted, row

BIASED, NORMED, DENSE, MOE = ("qwen2",), ("qwen3", "qwen3_moe"), ("qwen2", "qwen3"), ("qwen3_moe",)
HEAD_NORM, ROPE = "q_norm k_norm", "q_post_rope k_post_rope"
ACT, PRODUCT = "ffn_silu moe_expert_swigl", "ffn_swigl moe_expert_swigl"
# In half precision everybody rounds there.
F32 = ("float32",)

INPUTS = [
    row("input_other/post_ffn_residual/hidden", "post_ffn_residual", "hidden"),  # a parallel residual
    row("input_other/post_ffn_residual.second/attn_out", "post_ffn_residual", "attn_out"),
    row("input_other/ffn_norm/hidden", "ffn_norm", "hidden"),
    row("input_other/ffn_gate/post_attn_residual", "ffn_gate", "post_attn_residual", archs=DENSE),
    row("input_other/ffn_up/attn_norm", "ffn_up", "attn_norm", archs=DENSE),
    row("input_other/moe_router_logits/post_attn_residual", "moe_router_logits", "post_attn_residual", archs=MOE),
    row("input_other/qkv_matmul/hidden", "qkv_matmul", "hidden"),
    row("input_other/ffn_out/ffn_up", "ffn_out", "ffn_up", archs=DENSE),
    row("input_other/final_norm/post_attn_residual", "final_norm", "post_attn_residual", per_layer=False),
    row("input_other/k_post_rope/v", "k_post_rope", "v of qkv_bias", archs=BIASED),
    row("input_other/attention/k", "attention", "k of qkv_bias", archs=BIASED),
]

SCORES = [
    row("scores_hidden_dim", "attn_scores"),
    row("scores_capped/attn_scores/20", "attn_scores", 20.0),
    row("scores_capped/attn_softmax/20", "attn_softmax", 20.0),
    # float16 hides these.
    row("scores_capped/attn_scores/50", "attn_scores", 50.0, dtypes=F32),
    row("scores_capped/attn_softmax/30", "attn_softmax", 30.0, dtypes=F32),
    row("scores_scaled/1.25", "attn_scores", 1.25),
    row(f"softmax_temperature/{math.log(2)}", "attn_softmax", math.log(2)),  # 2ˣ in place of eˣ
    row("softmax_temperature/0.7", "attn_softmax", 0.7),
    row("softmax_undivided", "attn_softmax"),
    row("softmax_mean", "attn_softmax"),
    row("attention_unmerged", "attention"),
    row("o_proj_head_order/unmerged", "attn_out", "unmerged"),
    row("v_heads_next", "attention", config={"num_key_value_heads": 3}),
]

ACTIVATIONS = [
    row("gelu_quick", ACT),
    row("silu_missing/sigmoid", ACT, "sigmoid"),
    row("silu_missing/relu_squared", ACT, "relu_squared"),
    row("silu_on_both", PRODUCT),
    row("silu_on_up", "ffn_silu ffn_swigl", archs=DENSE),  # up·silu is taken as silu(up)·gate
]

NORMS = [
    row("norm_sum/attn_norm", "attn_norm"),
    row("norm_absolute/ffn_norm", "ffn_norm"),
    row("norm_weight_twice/attn_norm", "attn_norm"),
    row("norm_weight_missing/q_norm", "q_norm", archs=NORMED),
    row("norm_weight_neighbour/k_norm", "k_norm", "k_norm", archs=NORMED),
    row("head_norm_halves", HEAD_NORM, archs=NORMED),
]

BIASES = [
    row("bias_sign", "qkv_bias", archs=BIASED),
    row("bias_exchanged", "qkv_bias", "kv", archs=BIASED),
    row("bias_permuted/halves", "qkv_bias", "qk halves", archs=BIASED),
    row("bias_neighbour", "qkv_bias", "qkv", archs=BIASED),
]

ROUNDED = [
    *(
        row(f"stored_half/{stage}/{dtype}", stage, dtype, dtypes=F32)
        for stage in ("attn_norm", "k_post_rope", "attn_softmax", "attn_out", "post_ffn_residual")
        for dtype in ("float16", "bfloat16")
    ),
    row("weight_rounded/o_proj/bfloat16", "attn_out", "bfloat16", dtypes=F32),
    row("weight_rounded/input_layernorm/float16", "attn_norm", "float16", dtypes=F32),
    row("kv_cache_rounded/k/float16", "attn_scores", "float16", dtypes=F32),
    row("kv_cache_rounded/v/bfloat16", "attention", "bfloat16", dtypes=F32),
    row("kv_cache_rounded/v/int8", "attention", "int8"),
    row("kv_cache_rounded/k_post_rope/int8", "k_post_rope", "int8", dtypes=F32),
]

OTHERS = [
    row("rope_positions/17", ROPE, 17),  # left padding
    row("rope_positions/anew", ROPE),
    row("rope_doubled", ROPE),
    row("embedding_tokens", "embedding", per_layer=False),
    row("scaled/moe_router/2.5", "moe_router", 2.5, archs=MOE),
]

GROUPS: list[list[Planted]] = [INPUTS, SCORES, ACTIVATIONS, NORMS, BIASES, ROUNDED, OTHERS]
