"""`Config`: every number the mathematics needs. `config_json.py` and `gguf_config.py` read it from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from weights.errors import UserError, brief

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")


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


@dataclass(frozen=True)
class Config:
    """One model's numbers, by the names of `config.json`; hashable, and static in `jax.jit` (`params.py`)."""

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

    @classmethod
    def from_json(cls, stated: Any) -> Config:
        """What `to_json` gave; unknown names are left out. Raises `UserError` for a value of another type."""
        known = _fields(cls, stated)
        try:
            if known.get("rope_scaling") is not None:
                known["rope_scaling"] = RopeScaling(**_fields(RopeScaling, known["rope_scaling"]))
            config = cls(**known)
        except TypeError as error:  # a field that has no default is not there
            raise UserError(str(error).partition(" ")[2]) from None
        if not config.decoder_sparse_step:
            raise UserError("decoder_sparse_step is 0")
        return config


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


# The types of the fields above, as JSON has them.
_JSON_TYPES: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _whole,
    "int | None": lambda value: value is None or _whole(value),
    "float": lambda value: isinstance(value, float) or _whole(value),
    "bool": lambda value: isinstance(value, bool),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value),
    "tuple[int, ...]": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "RopeScaling | None": lambda value: value is None or isinstance(value, dict),
}


def _fields(of: type, stated: Any) -> dict[str, Any]:
    """The fields of a dataclass in a JSON object, lists as tuples."""
    if not isinstance(stated, dict):
        raise UserError(f"{brief(stated)} is no object")
    known = {name: stated[name] for name in of.__dataclass_fields__ if name in stated}
    for name, value in known.items():
        kind = of.__dataclass_fields__[name].type
        if not _JSON_TYPES[str(kind)](value):
            raise UserError(f"{name} is {brief(value)}, not {kind}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
