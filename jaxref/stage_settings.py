"""What a stage's function takes beside its inputs, and where a stage exists: functions of the config and the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weights import Config

Settings = Callable[[Config, int], dict[str, Any]]


def nothing(config: Config, layer: int) -> dict[str, Any]:
    """No settings."""
    return {}


def always(config: Config, layer: int) -> bool:
    """In every model."""
    return True


def eps(config: Config, layer: int) -> dict[str, Any]:
    """Of an RMSNorm."""
    return {"eps": config.rms_norm_eps}


def head_norm(which: str) -> Settings:
    """Of the norm of each head of "q" or "k"."""

    def settings(config: Config, layer: int) -> dict[str, Any]:
        return _part(config, which, packed=True) | eps(config, layer)

    return settings


def rope(which: str) -> Settings:
    """Of the rotation of "q" or "k"."""

    def settings(config: Config, layer: int) -> dict[str, Any]:
        part = _part(config, which, packed=not config.qk_norm)
        return part | {"head_dim": config.head_dim, "theta": config.rope_theta, "scaling": config.rope_scaling}

    return settings


def _part(config: Config, which: str, *, packed: bool) -> dict[str, int]:
    """Where q or k begins in its input, and how many heads it has."""
    if which == "q":
        return {"start": 0, "heads": config.num_attention_heads}
    return {"start": config.q_width if packed else 0, "heads": config.num_key_value_heads}


def attention_shape(config: Config, layer: int) -> dict[str, Any]:
    """Of the products of attention."""
    return {"kv_heads": config.num_key_value_heads, "head_dim": config.head_dim}


def is_dense(config: Config, layer: int) -> bool:
    """A layer without experts."""
    return not config.is_moe(layer)


def is_moe(config: Config, layer: int) -> bool:
    """A layer with experts."""
    return config.is_moe(layer)


def chosen_count(config: Config, layer: int) -> dict[str, Any]:
    """How many experts a token chooses."""
    return {"count": config.num_experts_per_tok}


def router_weights(config: Config, layer: int) -> dict[str, Any]:
    """And whether their weights are made to sum to one."""
    return chosen_count(config, layer) | {"renormalise": config.norm_topk_prob}
