"""`Config`: every number the mathematics needs, read from `config.json`; nothing that changes the maths is ignored."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from weights.errors import UserError

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")

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


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv:2309.00071) or linear position interpolation, by the names of `rope_scaling` in `config.json`."""

    rope_type: str  # "linear" | "yarn"
    factor: float
    original_max_position_embeddings: int = 0  # yarn only
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # what cos and sin are multiplied with
    truncate: bool = True


@jax.tree_util.register_static
@dataclass(frozen=True)
class Config:
    """One model's numbers, by the names of `config.json`; hashable and static, so that it passes through `jax.jit`."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # h
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]  # "full_attention" | "sliding_attention", one a layer
    sliding_window: int | None = None  # positions a sliding layer sees, itself included
    rope_scaling: RopeScaling | None = None
    num_experts: int = 0  # E; 0 in a dense model
    num_experts_per_tok: int = 0  # A
    moe_intermediate_size: int = 0  # M
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1  # every so many layers have experts
    mlp_only_layers: tuple[int, ...] = ()  # and these have none

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases (Qwen2)."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k goes through an RMSNorm (Qwen3)."""
        return self.model_type in ("qwen3", "qwen3_moe")

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        sparse = (layer + 1) % self.decoder_sparse_step == 0
        return bool(self.num_experts) and sparse and layer not in self.mlp_only_layers

    @property
    def q_width(self) -> int:
        """H·h: the columns of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K·h: the columns of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """The attention window of one layer in positions; None where it sees the whole past."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def dims(self) -> dict[str, int]:
        """The dimension key of the stage contract, letter by letter."""
        return {
            "D": self.hidden_size,
            "H": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "h": self.head_dim,
            "F": self.intermediate_size,
            "V": self.vocab_size,
            "L": self.num_hidden_layers,
            "E": self.num_experts,
            "A": self.num_experts_per_tok,
            "M": self.moe_intermediate_size,
        }

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `layer_types` as a list."""
        return json.loads(json.dumps(asdict(self)))


def read_config(path: Path) -> Config:
    """Read a `config.json`. Raises `UserError` where it is missing, broken or asks for unknown maths."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint needs its config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
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
        raise UserError(f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    _refuse_unknown(raw)
    get = _Reader(raw)
    heads, layers = get.count("num_attention_heads"), get.count("num_hidden_layers")
    hidden = get.count("hidden_size")
    window = get.count("sliding_window") if get.flag("use_sliding_window") and raw.get("sliding_window") else None
    theta, scaling = _rope(raw)
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
        f"{key} = {raw[key]!r} is not supported (only {' or '.join(map(repr, allowed))})"
        for key, allowed in ONLY.items()
        if key in raw and raw[key] not in allowed
    ]
    if raw.get("hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {raw['hidden_act']!r} is not supported (only 'silu')")
    bias_allowed = (True, None) if raw["model_type"] == "qwen2" else (False, None)
    if raw.get("attention_bias") not in bias_allowed:
        faults.append(f"attention_bias = {raw['attention_bias']!r} is not supported for {raw['model_type']}")
    # transformers keeps its own bookkeeping under names that begin with an underscore.
    handled = HANDLED | (MOE if raw["model_type"] == "qwen3_moe" else set())
    unknown = sorted(k for k in set(raw) - handled - HARMLESS - set(ONLY) if not k.startswith("_"))
    if unknown:
        faults.append(f"unknown keys that might change the maths: {', '.join(unknown)}")
    if faults:
        raise UserError("; ".join(faults))


class _Reader:
    """Typed look-ups in a raw config; a wrong type is a `UserError` that names the key."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a positive whole number, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key} must be a positive number, not {value!r}")
        return float(value)


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
            raise UserError(f"layer_types of a qwen3_moe can only be {layers} × {every[0]!r} here, not {stated!r}")
        return every
    if stated is None:
        first = _Reader(raw).number("max_window_layers", 28) if raw.get("max_window_layers") != 0 else 0
        return tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(stated, list) or len(stated) != layers or any(t not in known for t in stated):
        raise UserError(f"layer_types must name {' or '.join(known)} for each of {layers} layers, not {stated!r}")
    if "sliding_attention" in stated and window is None:
        raise UserError("layer_types names sliding_attention, but use_sliding_window/sliding_window give no window")
    return tuple(stated)


def _experts(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The numbers of the experts: `num_experts` in published configs, `num_local_experts` in newer ones."""
    if raw["model_type"] != "qwen3_moe":
        return {}
    get, names = _Reader(raw), [name for name in ("num_experts", "num_local_experts") if raw.get(name) is not None]
    if len({raw[name] for name in names if isinstance(raw[name], int)}) > 1:
        raise UserError(f"num_experts and num_local_experts disagree: {raw[names[0]]} and {raw[names[1]]}")
    only_dense = raw.get("mlp_only_layers") or []
    if not isinstance(only_dense, list) or not all(type(i) is int and 0 <= i < layers for i in only_dense):
        raise UserError(f"mlp_only_layers must list layers from 0 to {layers - 1}, not {only_dense!r}")
    found = {
        "num_experts": get.count(names[0] if names else "num_experts"),
        "num_experts_per_tok": get.count("num_experts_per_tok"),
        "moe_intermediate_size": get.count("moe_intermediate_size"),
        "norm_topk_prob": get.flag("norm_topk_prob"),
        "decoder_sparse_step": get.count("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(only_dense),
    }
    if found["num_experts_per_tok"] > found["num_experts"]:
        raise UserError(f"num_experts_per_tok is more than num_experts {found['num_experts']}")
    return found


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the older `rope_theta`/`rope_scaling` or the newer `rope_parameters`."""
    older, newer = raw.get("rope_scaling"), raw.get("rope_parameters")
    stated = newer if newer is not None else older
    if stated is not None and not isinstance(stated, dict):
        raise UserError(f"rope_scaling/rope_parameters must be an object, not {stated!r}")
    stated = dict(stated or {})
    outer, inner = raw.get("rope_theta"), stated.pop("rope_theta", None)
    theta = _Reader({"rope_theta": inner if outer is None else outer}).number("rope_theta", 10000.0)
    if None not in (outer, inner) and outer != inner:
        raise UserError(f"rope_theta and rope_parameters.rope_theta disagree: {outer} and {inner}")
    kinds = [k for k in (stated.pop("rope_type", None), stated.pop("type", None)) if k is not None]
    kind = kinds[0] if kinds else "default"
    if kinds and kinds != [kind] * len(kinds):
        raise UserError(f"rope_scaling names two types: {kinds}")
    if kind == "default":
        if stated:
            raise UserError(f"rope_scaling has keys without a type that uses them: {', '.join(sorted(stated))}")
        return theta, None
    return theta, _scaling(kind, stated, raw)


def _scaling(kind: str, stated: dict[str, Any], raw: dict[str, Any]) -> RopeScaling:
    known = {
        "linear": {"factor"},
        "yarn": {
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "truncate",
            "mscale",
            "mscale_all_dim",
        },
    }
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"rope_scaling type {kind!r} is not supported (only {', '.join(known)})")
    if set(stated) - known[kind]:
        raise UserError(f"rope_scaling ({kind}) has unknown keys: {', '.join(sorted(set(stated) - known[kind]))}")
    get = _Reader(stated)
    factor = get.number("factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    return RopeScaling(
        kind,
        factor,
        get.count("original_max_position_embeddings", raw.get("max_position_embeddings")),
        get.number("beta_fast", 32.0),
        get.number("beta_slow", 1.0),
        get.number("attention_factor", _yarn_attention_factor(factor, stated)),
        get.flag("truncate", True),
    )


def _yarn_attention_factor(factor: float, stated: dict[str, Any]) -> float:
    """Section 3.4 of the YaRN paper; `mscale` and `mscale_all_dim` as DeepSeek's configs have them."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if not (stated.get("mscale") and stated.get("mscale_all_dim")):
        return mscale(1.0)
    get = _Reader(stated)
    return mscale(get.number("mscale")) / mscale(get.number("mscale_all_dim"))


def _check(config: Config) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim {config.head_dim} is odd: RoPE turns pairs")
