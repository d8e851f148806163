"""The metadata of a GGUF file as the `Config` it means to llama.cpp; what would change the maths is refused by name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from weights.config import Config
from weights.config_json import config_from_dict
from weights.errors import UserError, brief, listed

ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}

# Keys below `{architecture}.` and what `config.json` calls them.
REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
DENSE = {"feed_forward_length": "intermediate_size"}
MOE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
# Read by the functions below.
HANDLED = frozenset("vocab_size attention.value_length rope.dimension_count".split())
YARN = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
ROPE = frozenset(["rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", *YARN])
# Keys that would change the maths unless they hold one of these values.
ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),  # -1 is "not stated"
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}


def read_gguf_config(path: Path, metadata: dict[str, Any], tensors: Collection[str]) -> Config:
    """`config_from_metadata`, with the file's name before what is wrong."""
    try:
        return config_from_metadata(metadata, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from_metadata(metadata: dict[str, Any], tensors: Collection[str]) -> Config:
    """The config of a file with these tensors, by Hugging Face's names. Raises `UserError` for unknown maths.

    Only the keys below the architecture's own name reach llama.cpp's maths; all others are notes.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"general.architecture {brief(arch)} is not supported; supported are {known}")
    if metadata.get("general.type", "model") != "model":
        raise UserError(f"general.type is {brief(metadata['general.type'])}, and not a model")
    known = {key.removeprefix(arch + "."): v for key, v in metadata.items() if key.startswith(arch + ".")}
    required = REQUIRED | (MOE if arch == "qwen3moe" else DENSE)
    _refuse(arch, known, required, len(tensors))
    tokens = metadata.get("tokenizer.ggml.tokens")
    renamed = required | DENSE | OPTIONAL
    raw = {name: known[key] for key, name in renamed.items() if key in known}
    raw |= {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": known.get("vocab_size", len(tokens) if isinstance(tokens, list) else 0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "rope_scaling": _scaling(known),
    }
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    if "head_dim" not in raw and type(hidden) is type(heads) is int and heads:
        raw["head_dim"] = hidden // heads
    if arch == "qwen3moe":
        raw |= _experts(raw, tensors)
    config = config_from_dict(raw)
    for key in ("attention.value_length", "rope.dimension_count"):
        if known.get(key, config.head_dim) != config.head_dim:
            raise UserError(f"{arch}.{key} = {brief(known[key])} is not supported: each head has {config.head_dim}")
    return config


def _refuse(arch: str, known: dict[str, Any], required: dict[str, str], count: int) -> None:
    """Raise one `UserError` for all keys that a file of `count` tensors lacks or may not have, or not so."""
    faults = [f"{arch}.{key} is missing" for key in required if key not in known]
    # So that no loop over layers or experts is longer than the file.
    faults += [
        f"{arch}.{key} = {known[key]}, but there are {count} tensors"
        for key in ("block_count", "expert_count")
        if type(known.get(key)) is int and known[key] > count
    ]
    faults += [
        f"{arch}.{key} = {brief(known[key])} is not supported (only {' or '.join(map(repr, allowed))})"
        for key, allowed in ONLY.items()
        if key in known and known[key] not in allowed
    ]
    handled = {*required, *DENSE, *OPTIONAL, *HANDLED, *ROPE, *ONLY}
    if unknown := sorted(set(known) - handled):
        faults.append(f"unknown keys that might change the maths: {listed([f'{arch}.{key}' for key in unknown])}")
    if faults:
        raise UserError("; ".join(faults))


def _experts(raw: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """What llama.cpp takes for granted (it always normalises), and which layers have a dense feed-forward."""
    layers = raw["num_hidden_layers"]
    count = layers if isinstance(layers, int) else 0
    dense = [i for i in range(count) if f"model.layers.{i}.mlp.gate_proj.weight" in tensors]
    unused = raw["moe_intermediate_size"]  # where no layer is dense, any size will do
    return {"norm_topk_prob": True, "mlp_only_layers": dense, "intermediate_size": raw.get("intermediate_size", unused)}


def _scaling(known: dict[str, Any]) -> dict[str, Any] | None:
    """RoPE scaling as `config.json` has it; a factor without a type is linear, a factor of 0 is none."""
    factor = known.get("rope.scaling.factor", 0)
    kind = known.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and not factor):
        return None
    stated = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        stated |= {name: known[key] for key, name in YARN.items() if known.get(key)}
    return stated
