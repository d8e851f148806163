"""nnsight: values of modules, and of single operations by `.source`, written inside the trace as they come to exist.

(Saving them all for after the trace, as its documentation does, takes the memory of the whole tree and no less time.)
"""

from __future__ import annotations

import sys

import torch
from nnsight import TransformersModel

from tests.benchmarks.peers.emit import heads_last, read_tokens, writer


def main(model: str, tokens: str, output: str) -> None:
    options = {"dtype": torch.float32, "attn_implementation": "eager", "device_map": "cpu", "dispatch": True}
    lm = TransformersModel(model, task="text-generation", **options)
    emit, ids = writer(output), read_tokens(tokens)
    # Before the trace: the source of a forward is rewritten when it is first asked for.
    calls = [layer.self_attn.source.attention_interface_1 for layer in lm.model.layers]
    # In the order of the computation, which nnsight insists on.
    with torch.no_grad(), lm.trace(ids, use_cache=False, logits_to_keep=1):
        emit(0, "embedding", lm.model.embed_tokens.output[0])
        for i, layer in enumerate(lm.model.layers):
            attn, mlp, call = layer.self_attn, layer.mlp, calls[i]
            emit(i, "attn_norm", layer.input_layernorm.output[0])
            emit(i, "qkv_bias", torch.cat([p.output[0] for p in (attn.q_proj, attn.k_proj, attn.v_proj)], dim=-1))
            _, q, k, *_ = call.inputs[0]
            emit(i, "q_post_rope", heads_last(q))
            emit(i, "k_post_rope", heads_last(k))
            emit(i, "attn_scores", call.source.attn_weights_0.output[0])
            emit(i, "attn_softmax", call.source.attn_weights_2.output[0])
            emit(i, "attention", attn.o_proj.input[0])
            emit(i, "attn_out", attn.o_proj.output[0])
            emit(i, "post_attn_residual", layer.post_attention_layernorm.input[0])
            emit(i, "ffn_norm", layer.post_attention_layernorm.output[0])
            emit(i, "ffn_gate", mlp.gate_proj.output[0])
            emit(i, "ffn_silu", mlp.act_fn.output[0])
            emit(i, "ffn_up", mlp.up_proj.output[0])
            emit(i, "ffn_swigl", mlp.down_proj.input[0])
            emit(i, "ffn_out", mlp.down_proj.output[0])
            emit(i, "post_ffn_residual", layer.output[0])
        emit(None, "final_norm", lm.model.norm.output[0])
        emit(None, "lm_head", lm.lm_head.output[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
