"""Tensors called as PyTorch calls the modules of Hugging Face's Qwen: what a forward hook on each of them sees.

What happens between modules (RoPE, scores, the residual after attention) shows nowhere, so that it is not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from jaxref.stages import STAGES, Key
from weights import UserError
from weights.errors import brief

_INNER = re.compile(r"(?:model\.)?layers\.([0-9]{1,9})(?:\.(.+))?")
_AROUND = re.compile(r"(?:model\.)?(?:embed_tokens|layers|norm|rotary_emb|lm_head)|model|")
_WHOLE: dict[str, Key] = {"embed_tokens": (0, "embedding"), "norm": (None, "final_norm"), "lm_head": (None, "lm_head")}
# Each module that gives a stage, in the order in which several make one; the layer itself is the last.
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.qkv_proj": "qkv",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.act_fn": "ffn_silu",
    "mlp.down_proj": "ffn_out",
    "mlp": "mlp",
    "": "post_ffn_residual",
}
_APART, _JOINED = {f"self_attn.{name}_proj" for name in "qkv"}, {"self_attn.qkv_proj"}
_SHOWN = {*_MODULES.values(), *(stage for _, stage in _WHOLE.values()), "qkv_bias", "moe_ffn_out"}
HIDDEN = frozenset(STAGES) - _SHOWN  # stages that no module gives


def gives_stage(name: str) -> bool:
    """Whether a module of this name gives a stage, or a part of one."""
    found = _INNER.fullmatch(name)
    return name.removeprefix("model.") in _WHOLE if found is None else (found[2] or "") in _MODULES


def is_module(name: str) -> bool:
    """Whether it is the name of a module in a layer or around the layers, whatever it gives."""
    return bool(_INNER.fullmatch(name) or _AROUND.fullmatch(name))


def stages_of_modules(names: Collection[str], where: Path) -> dict[Key, list[str]]:
    """The stages that modules of these names give, each with the names of its parts in their order.

    Nothing where none is a module's in a layer: `lm_head` is called so by others too. `where` they are, for messages.
    Raises `UserError` where two names are the same module.
    """
    inner = {name: (int(match[1]), match[2] or "") for name in names if (match := _INNER.fullmatch(name))}
    modules: dict[tuple[int, str], str] = {}
    for name, place in inner.items():
        if (other := modules.setdefault(place, name)) != name:
            raise UserError(f"{where}: {brief(name)} and {brief(other)} are the same module; give one")
    found: dict[Key, list[str]] = {}
    for layer in {layer for layer, _ in modules}:
        there = {module: modules[layer, module] for module in _MODULES if (layer, module) in modules}
        has_experts = any((layer, module) in modules for module in ("mlp.gate", "mlp.experts"))
        for stage, module in _stages(there, has_experts=has_experts):
            found.setdefault((layer, stage), []).append(there[module])
    if not found:
        return {}
    around = {name.removeprefix("model."): name for name in names if name not in inner}
    return found | {key: [around[module]] for module, key in _WHOLE.items() if module in around}


def _stages(there: Collection[str], *, has_experts: bool) -> Iterator[tuple[str, str]]:
    """The stages of one layer, each with a module that gives it or a part of it."""
    joined = _APART if set(there) >= _APART else _JOINED
    # A projection with a bias gives no sum without it. Models with norms of q and k have no biases.
    packed = "qkv_matmul" if "self_attn.q_norm" in there else "qkv_bias"
    for module in there:
        stage = _MODULES[module]
        if stage == "mlp":
            if has_experts or "mlp.down_proj" not in there:
                yield ("moe_ffn_out" if has_experts else "ffn_out"), module
        elif stage != "qkv":
            yield stage, module
        elif module in joined:
            yield packed, module
