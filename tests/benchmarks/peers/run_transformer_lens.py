"""TransformerLens: `run_with_cache` on its bridge to transformers, and what is a stage of ours written to files."""

from __future__ import annotations

import re
import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

from tests.benchmarks.peers.emit import read_tokens, writer

# Its hooks by our names. The cache has many tensors under several names; asked for and written is each one once.
HOOKS = {
    "attn.hook_rot_q": "q_post_rope",
    "attn.hook_rot_k": "k_post_rope",
    "attn.hook_attn_scores": "attn_scores",
    "attn.hook_pattern": "attn_softmax",
    "attn.hook_z": "attention",
    "ln1.hook_out": "attn_norm",
    "hook_attn_out": "attn_out",
    "hook_resid_mid": "post_attn_residual",
    "ln2.hook_out": "ffn_norm",
    "mlp.hook_pre": "ffn_gate",
    "mlp.hook_pre_linear": "ffn_up",
    "mlp.hook_post": "ffn_swigl",
    "hook_mlp_out": "ffn_out",
    "hook_resid_post": "post_ffn_residual",
}
PARTS = ("attn.hook_q", "attn.hook_k", "attn.hook_v")  # side by side they are `qkv_bias`
WHOLE = {"hook_embed": (0, "embedding"), "ln_final.hook_out": (None, "final_norm")}


def wanted(name: str) -> bool:
    """Whether a hook has something for us."""
    found = re.match(r"blocks\.\d+\.(.+)", name)
    return name in WHOLE if found is None else found[1] in (*HOOKS, *PARTS)


def main(model: str, tokens: str, output: str) -> None:
    bridge = TransformerBridge.boot_transformers(model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            read_tokens(tokens), return_cache_object=False, names_filter=wanted, logits_to_keep=1
        )
    emit = writer(output)
    for name, (layer, stage) in WHOLE.items():
        emit(layer, stage, cache[name][0])
    for layer in range(bridge.cfg.n_layers):
        for hook, stage in HOOKS.items():
            emit(layer, stage, cache[f"blocks.{layer}.{hook}"][0])
        emit(layer, "qkv_bias", torch.cat([cache[f"blocks.{layer}.{part}"][0].flatten(1) for part in PARTS], dim=-1))
    emit(None, "lm_head", logits[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
