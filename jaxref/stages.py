"""THE table of stages, in computation order: name, shape, which models have it, its function and where that reads.

`model.py` is the same graph written for people; a test checks that running this table gives the same bytes.
"""

from __future__ import annotations

from typing import Any

from jaxref import attention as attn
from jaxref import feedforward as ffn
from jaxref import ops
from jaxref import stage_settings as at
from jaxref.stage import QKV, Stage
from weights import Config, UserError

TOKENS, POSITIONS, HIDDEN = "tokens", "positions", "hidden"  # inputs that are not stages of the same layer
ALIASES = {"layer_output": "post_ffn_residual"}
Key = tuple[int | None, str]  # (layer, or None for the whole model; stage)


def _table(*rows: Stage) -> dict[str, Stage]:
    return {row.name: row for row in rows}


def _dense(name: str, axis: str, meaning: str, *rest: Any) -> Stage:
    """A stage of layers without experts, [S, axis]."""
    return Stage(name, ("S", axis), meaning, *rest, when=at.is_dense)


def _moe(name: str, axes: str, meaning: str, *rest: Any, canonical: bool = False) -> Stage:
    """A stage of layers with experts, [S, axes…]."""
    per_expert = name in ("expert_gate", "expert_up", "expert_out")
    kind: dict[str, Any] = {"canonical": canonical, "last": True, "per_expert": per_expert}
    return Stage(f"moe_{name}", ("S", *axes), meaning, *rest, when=at.is_moe, **kind)


_QKV_BIASED = "qkv_bias|qkv_matmul"
_LOGITS = ("moe_router_logits",)

STAGES: dict[str, Stage] = _table(
    Stage("embedding", ("S", "D"), "token embedding", ops.embed, (TOKENS,), ("embed_tokens",), scope="first"),
    Stage("attn_norm", ("S", "D"), "RMSNorm before QKV", ops.rms_norm, (HIDDEN,), ("input_layernorm",), at.eps),
    Stage(
        "qkv_matmul",
        ("S", QKV),
        "q, k and v side by side, before the bias",
        attn.qkv_matmul,
        ("attn_norm",),
        ("q_proj", "k_proj", "v_proj"),
        lambda config, layer: {"rounded": True},
    ),
    Stage(
        "qkv_bias",
        ("S", QKV),
        "after the bias, before RoPE",
        attn.qkv_bias,
        ("qkv_matmul",),
        ("q_bias", "k_bias", "v_bias"),
        when=lambda config, layer: config.qkv_bias,
    ),
    Stage(
        "q_norm",
        ("S", "Hh"),
        "q after its per-head RMSNorm, before RoPE",
        attn.head_norm,
        (_QKV_BIASED,),
        ("q_norm",),
        at.head_norm("q"),
        when=lambda config, layer: config.qk_norm,
        canonical=False,
    ),
    Stage(
        "k_norm",
        ("S", "Kh"),
        "k after its per-head RMSNorm, before RoPE",
        attn.head_norm,
        (_QKV_BIASED,),
        ("k_norm",),
        at.head_norm("k"),
        when=lambda config, layer: config.qk_norm,
        canonical=False,
    ),
    Stage(
        "q_post_rope", ("S", "Hh"), "q after RoPE", attn.rope, (f"q_norm|{_QKV_BIASED}", POSITIONS), (), at.rope("q")
    ),
    Stage(
        "k_post_rope", ("S", "Kh"), "k after RoPE", attn.rope, (f"k_norm|{_QKV_BIASED}", POSITIONS), (), at.rope("k")
    ),
    Stage(
        "attn_scores",
        ("H", "S", "S"),
        "q·kᵀ/√h, before the causal mask",
        attn.attn_scores,
        ("q_post_rope", "k_post_rope"),
        (),
        at.attention_shape,
    ),
    Stage(
        "attn_softmax",
        ("H", "S", "S"),
        "softmax over the keys a query may see",
        attn.attn_softmax,
        ("attn_scores", POSITIONS, POSITIONS),
        (),
        lambda config, layer: {"window": config.window(layer)},
    ),
    Stage(
        "attention",
        ("S", "Hh"),
        "softmax·v, before the output projection",
        attn.attention,
        ("attn_softmax", _QKV_BIASED),
        (),
        lambda config, layer: at.attention_shape(config, layer) | {"start": config.q_width + config.kv_width},
    ),
    Stage("attn_out", ("S", "D"), "after the output projection", ops.linear, ("attention",), ("o_proj",)),
    Stage("post_attn_residual", ("S", "D"), "hidden state after attention", ops.add, (HIDDEN, "attn_out")),
    Stage(
        "ffn_norm",
        ("S", "D"),
        "RMSNorm before the FFN or router",
        ops.rms_norm,
        ("post_attn_residual",),
        ("post_attention_layernorm",),
        at.eps,
    ),
    _dense("ffn_gate", "F", "gate projection", ops.linear, ("ffn_norm",), ("gate_proj",)),
    _dense("ffn_up", "F", "up projection", ops.linear, ("ffn_norm",), ("up_proj",)),
    _dense("ffn_silu", "F", "silu(gate)", ops.silu, ("ffn_gate",)),
    _dense("ffn_swigl", "F", "silu(gate)·up", ops.multiply, ("ffn_silu", "ffn_up")),
    _dense("ffn_out", "D", "after the down projection", ops.linear, ("ffn_swigl",), ("down_proj",)),
    _moe("router_logits", "E", "router matmul, before the softmax", ops.linear, ("ffn_norm",), ("router",)),
    _moe(
        "router", "A", "weights of the chosen experts", ffn.moe_router, _LOGITS, (), at.router_weights, canonical=True
    ),
    _moe("router_indices", "A", "their ids", ffn.moe_router_indices, _LOGITS, (), at.chosen_count, canonical=True),
    _moe("expert_gate", "AM", "gate inside each chosen expert", ops.linear, ("ffn_norm",), ("gate_proj",)),
    _moe("expert_up", "AM", "up inside each chosen expert", ops.linear, ("ffn_norm",), ("up_proj",)),
    _moe("expert_swigl", "AM", "silu(gate)·up there", ffn.swiglu, ("moe_expert_gate", "moe_expert_up")),
    _moe("expert_out", "AD", "each chosen expert's output", ops.linear, ("moe_expert_swigl",), ("down_proj",)),
    _moe(
        "ffn_out",
        "D",
        "weighted sum over a token's experts",
        ffn.moe_ffn_out,
        ("moe_expert_out", "moe_router", "moe_router_indices"),
        canonical=True,
    ),
    Stage(
        "post_ffn_residual",
        ("S", "D"),
        "hidden state after the FFN",
        ops.add,
        ("post_attn_residual", "ffn_out|moe_ffn_out"),
    ),
    Stage("final_norm", ("S", "D"), "RMSNorm before the head", ops.rms_norm, (HIDDEN,), ("norm",), at.eps, "model"),
    Stage("lm_head", ("S", "V"), "logits", ops.linear, ("final_norm",), ("head",), scope="model", last=True),
)


def stages_of(config: Config, layer: int | None) -> list[Stage]:
    """The stages of one layer (None: of the whole model), in computation order."""
    return [stage for stage in STAGES.values() if stage.exists(config, layer)]


def keys_of(config: Config) -> list[Key]:
    """Every stage of the model with its layer, in computation order."""
    places: list[int | None] = [*range(config.num_hidden_layers), None]
    return [(layer, stage.name) for layer in places for stage in stages_of(config, layer)]


def inputs_of(stage: Stage, config: Config, layer: int | None) -> list[Key | str]:
    """The keys of the stages that this one reads; `tokens` and `positions` as words."""
    return [_resolve(name, config, layer) for name in stage.inputs]


def _resolve(name: str, config: Config, layer: int | None) -> Key | str:
    if name in (TOKENS, POSITIONS):
        return name
    if name == HIDDEN:
        before = config.num_hidden_layers if layer is None else layer
        return (before - 1, "post_ffn_residual") if before else (0, "embedding")
    for candidate in name.split("|"):
        if STAGES[candidate].exists(config, layer):
            return (layer, candidate)
    raise AssertionError(f"no model has {name} at {layer}")


def stage_named(name: str) -> Stage:
    """Look a stage up by its name or alias, in any case. Raises `UserError` with the valid names."""
    lowered = name.strip().lower()
    lowered = ALIASES.get(lowered, lowered)
    if lowered not in STAGES:
        raise UserError(f"unknown stage {name.strip()!r}; stages are {', '.join(STAGES)}")
    return STAGES[lowered]
