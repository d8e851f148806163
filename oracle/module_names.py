"""Tensors called as PyTorch calls the modules of Hugging Face's Qwen: what a forward hook on each of them sees.

Engines shaped like vLLM (nano-vllm, SGLang) call theirs alike, with projections joined: `qkv_proj`, `gate_up_proj`.
Their `act_fn` multiplies too, and their layers hand the residual on apart, so that what a layer gives first is no sum.
What happens between modules (RoPE, the residual after attention) shows nowhere, so that it is not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
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
    "self_attn.attn": "attention",
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
_MARKS = (*_JOINED, "mlp.gate_up_proj")  # of an engine like vLLM
_LIKE_VLLM = {**_MODULES, "mlp.act_fn": "ffn_swigl", "": ""}
_ALWAYS = {"qkv_bias", "ffn_out", "moe_ffn_out", *(stage for _, stage in _WHOLE.values())}


def is_module(name: str) -> bool:
    """Whether it is the name of a module in a layer or around the layers, whatever it gives."""
    return bool(_INNER.fullmatch(name) or _AROUND.fullmatch(name))


def stages_of_modules(names: Collection[str], where: Path) -> tuple[dict[Key, list[str]], frozenset[str]]:
    """The stages that modules of these names give, each with its parts' names in order; and those that none gives.

    Nothing where none is a module's in a layer: `lm_head` is called so by others too. `where` they are, for messages.
    Raises `UserError` where two names are the same module.
    """
    inner = {name: (int(match[1]), match[2] or "") for name in names if (match := _INNER.fullmatch(name))}
    modules: dict[tuple[int, str], str] = {}
    for name, place in inner.items():
        if (other := modules.setdefault(place, name)) != name:
            raise UserError(f"{where}: {brief(name)} and {brief(other)} are the same module; give one")
    table = _LIKE_VLLM if any(module in _MARKS for _, module in modules) else _MODULES
    found: dict[Key, list[str]] = {}
    for layer in {layer for layer, _ in modules}:
        there = {module: modules[layer, module] for module in table if (layer, module) in modules}
        has_experts = any((layer, module) in modules for module in ("mlp.gate", "mlp.experts"))
        for stage, module in _stages(table, there, has_experts=has_experts):
            found.setdefault((layer, stage), []).append(there[module])
    if not found:
        return {}, frozenset()
    around = {name.removeprefix("model."): name for name in names if name not in inner}
    found |= {key: [around[module]] for module, key in _WHOLE.items() if module in around}
    # In Hugging Face's models attention is a function; an engine like vLLM has gate and up in one.
    elsewhere = {"attention"} if table is _MODULES else {"ffn_gate", "ffn_up"}
    seen = _ALWAYS | (set(table.values()) - elsewhere) | {stage for _, stage in found}
    return found, frozenset(STAGES) - seen


def _stages(table: Mapping[str, str], there: Collection[str], *, has_experts: bool) -> Iterator[tuple[str, str]]:
    """The stages of one layer, each with a module that gives it or a part of it."""
    joined = _APART if set(there) >= _APART else _JOINED
    # A projection with a bias gives no sum without it. Models with norms of q and k have no biases.
    packed = "qkv_matmul" if "self_attn.q_norm" in there else "qkv_bias"
    for module in there:
        stage = table[module]
        if stage == "mlp":
            if has_experts or "mlp.down_proj" not in there:
                yield ("moe_ffn_out" if has_experts else "ffn_out"), module
        elif stage == "qkv":
            if module in joined:
                yield packed, module
        elif stage:
            yield stage, module
