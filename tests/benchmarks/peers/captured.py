"""What a program captured, measured against jaxref's tree.

    python -m tests.benchmarks.peers.captured MODEL REFERENCE TREE

A stage counts as captured where all its layers are there with jaxref's values; prints one JSON object. In a process of
its own, since reading trees takes memory (see `measure`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jaxref.aprt import read_aprt
from jaxref.stages import STAGES, Key, keys_of
from jaxref.tree import stage_path
from weights import open_checkpoint

SAME = 1e-3  # relative L2: far above float32's rounding, far below any other tensor

# The files of `model_addition_debugger_context` for a stage of layer N: module and what of it.
DEBUGGER = {
    "embedding": ("model.embed_tokens_outputs",),
    "attn_norm": ("{layer}.input_layernorm_outputs",),
    "qkv_bias": tuple(f"{{layer}}.self_attn.{part}_proj_outputs" for part in "qkv"),
    "attention": ("{layer}.self_attn.o_proj_inputs_args_0",),
    "attn_out": ("{layer}.self_attn.o_proj_outputs",),
    "post_attn_residual": ("{layer}.post_attention_layernorm_inputs_args_0",),
    "ffn_norm": ("{layer}.post_attention_layernorm_outputs",),
    "ffn_gate": ("{layer}.mlp.gate_proj_outputs",),
    "ffn_up": ("{layer}.mlp.up_proj_outputs",),
    "ffn_silu": ("{layer}.mlp.act_fn_outputs",),
    "ffn_swigl": ("{layer}.mlp.down_proj_inputs_args_0",),
    "ffn_out": ("{layer}.mlp.down_proj_outputs",),
    "post_ffn_residual": ("{next}_inputs_args_0",),
    "final_norm": ("model.norm_outputs",),
    "lm_head": ("lm_head_outputs",),
}


def value(tree: Path, key: Key, layers: int) -> np.ndarray | None:
    """A stage's values [n] out of a tree of either kind; None where it has none."""
    layer, stage = key
    if (path := tree / stage_path(layer, stage)).exists():
        return read_aprt(path)[1]
    following = "model.norm" if layer is None or layer + 1 == layers else f"model.layers.{layer + 1}"
    names = [name.format(layer=f"model.layers.{layer}", next=following) for name in DEBUGGER.get(stage, ())]
    files = [tree / f"Qwen2ForCausalLM.{name}.safetensors" for name in names]
    if not files or not all(file.exists() for file in files):
        return None
    return np.concatenate([load_file(file)["data"][0] for file in files], axis=-1).reshape(-1)


def distance(key: Key, ours: np.ndarray, theirs: np.ndarray, count: int) -> float:
    """Relative L2 from jaxref's values; of scores only where a query may see the key."""
    if ours.size != theirs.size:
        return float("inf")
    if key[1] == "attn_scores":
        visible = np.tri(count, dtype=bool)
        ours, theirs = (values.reshape(-1, count, count)[:, visible] for values in (ours, theirs))
    wide = ours.astype(np.float64)
    return float(np.linalg.norm(theirs - wide) / np.linalg.norm(wide))


def captured(model: str, reference: Path, tree: Path) -> dict[str, Any]:
    """The stages that are there, those that are not, those that differ, and the greatest distance of the former."""
    config = open_checkpoint(model).config
    count = len(json.loads((reference / "manifest.json").read_text(encoding="utf-8"))["tokens"])
    worst: dict[str, float] = {}
    missing = set()
    for key in keys_of(config):
        ours = value(reference, key, config.num_hidden_layers)
        theirs = value(tree, key, config.num_hidden_layers)
        assert ours is not None, key
        if theirs is None:
            missing.add(key[1])
        else:
            worst[key[1]] = max(worst.get(key[1], 0.0), distance(key, ours, theirs, count))
    same = [stage for stage in STAGES if worst.get(stage, np.inf) < SAME and stage not in missing]
    return {
        "captured": same,
        "missing": [stage for stage in STAGES if stage in missing],
        "differs": [stage for stage in STAGES if stage in worst and stage not in (*same, *missing)],
        "worst": max((worst[stage] for stage in same), default=None),
    }


if __name__ == "__main__":
    print(json.dumps(captured(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
