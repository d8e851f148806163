"""RoPE's theta and scaling out of a `config.json`, by its older keys or its newer ones."""

from __future__ import annotations

import math
from typing import Any

from weights.config import RopeScaling
from weights.config_reader import ConfigReader
from weights.errors import UserError, brief, listed


def read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the older `rope_theta`/`rope_scaling` or the newer `rope_parameters`."""
    older, newer = raw.get("rope_scaling"), raw.get("rope_parameters")
    stated = newer if newer is not None else older
    if stated is not None and not isinstance(stated, dict):
        raise UserError(f"rope_scaling/rope_parameters must be an object, not {brief(stated)}")
    stated = dict(stated or {})
    outer, inner = raw.get("rope_theta"), stated.pop("rope_theta", None)
    theta = ConfigReader({"rope_theta": inner if outer is None else outer}).number("rope_theta", 10000.0)
    if None not in (outer, inner) and outer != inner:
        raise UserError(f"rope_theta and rope_parameters.rope_theta disagree: {brief(outer)} and {brief(inner)}")
    kinds = [k for k in (stated.pop("rope_type", None), stated.pop("type", None)) if k is not None]
    kind = kinds[0] if kinds else "default"
    if kinds and kinds != [kind] * len(kinds):
        raise UserError(f"rope_scaling names two types: {brief(kinds)}")
    if kind == "default":
        if stated:
            raise UserError(f"rope_scaling has keys without a type that uses them: {listed(sorted(stated))}")
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
        raise UserError(f"rope_scaling type {brief(kind)} is not supported (only {', '.join(known)})")
    if set(stated) - known[kind]:
        raise UserError(f"rope_scaling ({kind}) has unknown keys: {listed(sorted(set(stated) - known[kind]))}")
    get = ConfigReader(stated)
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
    get = ConfigReader(stated)
    return mscale(get.number("mscale")) / mscale(get.number("mscale_all_dim"))
