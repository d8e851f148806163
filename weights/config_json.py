"""A `config.json` into a `Config`; nothing that changes the maths is ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weights.config import MODEL_TYPES, Config
from weights.config_reader import ConfigReader
from weights.config_rope import read_rope
from weights.errors import UserError, brief, listed
from weights.files import read_json

# Keys that say nothing about the forward pass of an inference run: bookkeeping, training, generation, tokens.
HARMLESS = frozenset(
    """architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    decoder_start_token_id dtype eos_token_id finetuning_task id2label initializer_range is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id max_position_embeddings name_or_path output_attentions output_hidden_states
    output_router_logits router_aux_loss_coef
    pad_token_id prefix problem_type pruned_heads return_dict sep_token_id task_specific_params tf_legacy_loss
    tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache use_mrope""".split()
)
HANDLED = frozenset(
    """model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim rms_norm_eps rope_theta rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers
    layer_types tie_word_embeddings hidden_act attention_bias""".split()
)
MOE = frozenset(
    """num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
    mlp_only_layers""".split()
)
# Keys that would change the maths unless they hold one of these values.
ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_causal": (True,),
    "mlp_bias": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False, None),
    "use_qk_norm": (True,),
}


# More than any model has, and few enough for a name each: a config's numbers must not decide how much memory is taken.
MOST_LAYERS = MOST_EXPERTS = 1 << 12


def read_config(path: Path) -> Config:
    """Read a `config.json`. Raises `UserError` where it is missing, broken or asks for unknown maths."""
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint needs its config.json") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a JSON object was expected, this is a {type(raw).__name__}")
    try:
        return config_from_dict(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def config_from_dict(raw: dict[str, Any]) -> Config:
    """Turn the dictionary of a `config.json` into a `Config`. Raises `UserError` with every fault that it found."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type {brief(model_type)} is not supported; supported are {', '.join(MODEL_TYPES)}")
    _refuse_unknown(raw)
    get = ConfigReader(raw)
    heads, layers = get.count("num_attention_heads"), get.count("num_hidden_layers", most=MOST_LAYERS)
    hidden = get.count("hidden_size")
    window = get.count("sliding_window") if get.flag("use_sliding_window") and raw.get("sliding_window") else None
    theta, scaling = read_rope(raw)
    config = Config(
        model_type=model_type,
        vocab_size=get.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=get.count("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=get.count("num_key_value_heads", heads),
        head_dim=get.count("head_dim", _default_head_dim(model_type, hidden, heads)),
        rms_norm_eps=get.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        tie_word_embeddings=get.flag("tie_word_embeddings"),
        layer_types=_layer_types(raw, layers, window),
        sliding_window=window,
        rope_scaling=scaling,
        **_experts(raw, layers),
    )
    _check(config)
    return config


def _refuse_unknown(raw: dict[str, Any]) -> None:
    faults = [
        f"{key} = {brief(raw[key])} is not supported (only {' or '.join(map(repr, allowed))})"
        for key, allowed in ONLY.items()
        if key in raw and raw[key] not in allowed
    ]
    if raw.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {brief(raw['hidden_act'])} is not supported (only 'silu')")
    bias_allowed = (True, None) if raw["model_type"] == "qwen2" else (False, None)
    if raw.get("attention_bias") not in bias_allowed:
        faults.append(f"attention_bias = {brief(raw['attention_bias'])} is not supported for {raw['model_type']}")
    # transformers keeps its own bookkeeping under names that begin with an underscore.
    handled = HANDLED | (MOE if raw["model_type"] == "qwen3_moe" else set())
    unknown = sorted(k for k in set(raw) - handled - HARMLESS - set(ONLY) if not k.startswith("_"))
    if unknown:
        faults.append(f"unknown keys that might change the maths: {listed(unknown)}")
    if faults:
        raise UserError("; ".join(faults))


def _default_head_dim(model_type: str, hidden: int, heads: int) -> int:
    """transformers' own defaults: D/H for Qwen2, 128 for Qwen3."""
    return 128 if model_type != "qwen2" else hidden // heads


def _layer_types(raw: dict[str, Any], layers: int, window: int | None) -> tuple[str, ...]:
    """As stated; else sliding from `max_window_layers` on, where a window is in use (configuration_qwen2.py)."""
    stated = raw.get("layer_types")
    if raw["model_type"] == "qwen3_moe":
        # transformers gives every layer the window, whatever layer_types says; a config that says otherwise is refused.
        every = ("sliding_attention" if window else "full_attention",) * layers
        if stated is not None and stated != list(every):
            raise UserError(f"layer_types of a qwen3_moe can only be {layers} × {every[0]!r} here, not {brief(stated)}")
        return every
    if stated is None:
        first = ConfigReader(raw).number("max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
        return tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(stated, list) or len(stated) != layers or any(t not in known for t in stated):
        raise UserError(f"layer_types must name {' or '.join(known)} for each of {layers} layers, not {brief(stated)}")
    if "sliding_attention" in stated and window is None:
        raise UserError("layer_types names sliding_attention, but use_sliding_window/sliding_window give no window")
    return tuple(stated)


def _experts(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The numbers of the experts: `num_experts` in published configs, `num_local_experts` in newer ones."""
    if raw["model_type"] != "qwen3_moe":
        return {}
    get, names = ConfigReader(raw), [name for name in ("num_experts", "num_local_experts") if raw.get(name) is not None]
    if len({raw[name] for name in names if isinstance(raw[name], int)}) > 1:
        first, second = (brief(raw[name]) for name in names)
        raise UserError(f"num_experts and num_local_experts disagree: {first} and {second}")
    only_dense = raw.get("mlp_only_layers") or []
    if not isinstance(only_dense, list) or not all(type(i) is int and 0 <= i < layers for i in only_dense):
        raise UserError(f"mlp_only_layers must list layers from 0 to {layers - 1}, not {brief(only_dense)}")
    found = {
        "num_experts": get.count(names[0] if names else "num_experts", most=MOST_EXPERTS),
        "num_experts_per_tok": get.count("num_experts_per_tok"),
        "moe_intermediate_size": get.count("moe_intermediate_size"),
        "norm_topk_prob": get.flag("norm_topk_prob"),
        "decoder_sparse_step": get.count("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(dict.fromkeys(only_dense)),
    }
    if found["num_experts_per_tok"] > found["num_experts"]:
        raise UserError(f"num_experts_per_tok is more than num_experts {found['num_experts']}")
    return found


def _check(config: Config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim {config.head_dim} is odd: RoPE turns pairs")
