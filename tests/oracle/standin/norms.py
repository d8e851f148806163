"""RMSNorm of the hidden state, and of each head of q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.standin.place import Place

ROLES = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
_OTHER = {"attn_norm": "ffn_norm", "ffn_norm": "attn_norm", "q_norm": "k_norm", "k_norm": "q_norm"}


def rms_norm(here: Place, stage: str, x: Tensor) -> Tensor:
    """The hidden state [S, D] normed."""
    x = here.read(stage, x)
    if here.fault(f"norm_missing/{stage}"):
        return x
    if stage == "final_norm" and here.fault("norm_weight_other/final_norm"):
        first = here.weight(f"model.layers.0.{ROLES['attn_norm']}")
        return first * _normed(here, stage, x, (-1,))
    if here.fault(f"norm_weight_first/{stage}"):
        return _normed(here, stage, here.weight(ROLES[stage]) * x, (-1,))
    role = ROLES[_OTHER[stage]] if here.fault(f"norm_weight_other/{stage}") else ROLES[stage]
    return _weighted(here, stage, _normed(here, stage, x, (-1,)), role)


def head_norm(here: Place, stage: str, x: Tensor) -> Tensor:
    """q or k [S, heads, h], each head normed by itself."""
    if here.fault("head_norm_missing"):
        return x
    role = ROLES[_OTHER[stage]] if here.fault("head_norm_swapped") else ROLES[stage]
    over = (-2, -1) if here.fault("head_norm_row") else (-1,)
    if here.fault("head_norm_halves"):
        halves = [_normed(here, stage, half, (-1,)) for half in x.chunk(2, dim=-1)]
        return _weighted(here, stage, torch.cat(halves, dim=-1), role)
    return _weighted(here, stage, _normed(here, stage, x, over), role)


def _normed(here: Place, stage: str, x: Tensor, over: tuple[int, ...]) -> Tensor:
    """In float32, then rounded, as Hugging Face does it: the weight comes after."""
    eps = float(here.argument(f"norm_eps/{stage}") or here.config.get("rms_norm_eps", 1e-6))
    x = x.float()
    if here.fault(f"layer_norm/{stage}"):
        x = x - x.mean(over, keepdim=True)
    if here.fault(f"norm_sum/{stage}"):
        return here.round(x * torch.rsqrt(x.square().sum(over, keepdim=True) + eps))
    if here.fault(f"norm_unrooted/{stage}"):
        return here.round(x / (x.square().mean(over, keepdim=True) + eps))
    if here.fault(f"norm_absolute/{stage}"):
        return here.round(x / (x.abs().mean(over, keepdim=True) + eps))
    size = x.square().mean(over, keepdim=True)
    if how := here.argument(f"norm_overflow/{stage}"):
        squares = x.half().square().float()
        size = squares.mean(over, keepdim=True)
        if how == "sum":
            size = squares.sum(over, keepdim=True).half().float() / x.shape[-1]
    if count := here.argument(f"norm_partial/{stage}"):
        size = x[..., : int(count)].square().sum(over, keepdim=True) / x.shape[-1]
    if here.fault(f"norm_size_other/{stage}/first"):
        size = size[:1]
    if here.fault(f"norm_size_other/{stage}/all"):
        size = x.square().mean((0, *over), keepdim=True)
    if here.fault(f"norm_size_other/{stage}/head"):
        size = size[:, :1]
    unit = x * torch.rsqrt(size + eps)
    if kind := here.argument(f"norm_rounded/{stage}"):
        unit = unit.to(getattr(torch, kind)).float()
    return here.round(unit)


def _weighted(here: Place, stage: str, normed: Tensor, role: str) -> Tensor:
    if here.fault(f"norm_weight_missing/{stage}"):
        return normed
    weight = here.weight(role)
    if here.fault(f"head_norm_permuted/{stage}"):
        weight = weight.view(2, -1).T.flatten()
    if here.fault(f"norm_one_plus_w/{stage}", *(["norm_one_plus_w/head_norm"] if normed.dim() == 3 else [])):
        weight = weight + 1
    if here.fault(f"norm_weight_twice/{stage}"):
        normed = weight * normed
    return weight * normed
