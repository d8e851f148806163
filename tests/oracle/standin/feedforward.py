"""The dense SwiGLU block and the mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.oracle.standin.place import Place


def is_moe(here: Place) -> bool:
    """Whether this layer has experts."""
    step = here.config.get("decoder_sparse_step", 1)
    dense = here.layer in (here.config.get("mlp_only_layers") or ())
    return bool(here.config.get("num_experts")) and not dense and (here.number + 1) % step == 0


def feed_forward(here: Place, x: Tensor) -> Tensor:
    """The feed-forward branch [S, D] of one layer."""
    return _mixture(here, x) if is_moe(here) else _dense(here, x)


def _dense(here: Place, x: Tensor) -> Tensor:
    roles = ("up_proj", "gate_proj") if here.fault("gate_up_swapped") else ("gate_proj", "up_proj")
    gate = here.linear(here.read("ffn_gate", x), f"mlp.{roles[0]}.weight")
    up = here.linear(here.read("ffn_up", x), f"mlp.{roles[1]}.weight")
    if here.fault("gate_up_interleaved/turns"):
        fused = torch.cat([gate, up], dim=-1)
        gate, up = fused[..., 0::2], fused[..., 1::2]
    if here.fault("gate_up_interleaved/halves"):
        gate, up = torch.stack([gate, up], dim=-1).flatten(-2).chunk(2, dim=-1)
    gate, up = here.emit("ffn_gate", gate), here.emit("ffn_up", up)
    if here.fault("silu_on_up"):
        gate, up = up, gate
    act = here.emit("ffn_silu", _activated(here, gate))
    product = here.emit("ffn_swigl", _gated(here, act, gate, up))
    return here.emit("ffn_out", here.linear(here.read("ffn_out", product), "mlp.down_proj.weight"))


def _activated(here: Place, gate: Tensor) -> Tensor:
    gate = gate.float()
    if here.fault("gelu_tanh"):
        act = F.gelu(gate, approximate="tanh")
    elif here.fault("gelu_erf"):
        act = F.gelu(gate)
    elif here.fault("silu_missing"):
        act = gate
    elif here.fault("silu_missing/relu"):
        act = F.relu(gate)
    elif here.fault("gelu_quick"):
        act = gate / (1 + (-1.702 * gate).exp())
    elif here.fault("silu_missing/sigmoid"):
        act = gate.sigmoid()
    elif kind := here.argument("silu_overflow"):
        powers = gate.exp().to(getattr(torch, kind)).float()
        act = gate * (powers / (1 + powers))
    elif here.fault("silu_missing/tanh"):
        act = gate.tanh()
    elif here.fault("silu_missing/hardswish"):
        act = F.hardswish(gate)
    elif here.fault("silu_missing/relu_squared"):
        act = F.relu(gate) ** 2
    else:
        act = F.silu(gate)
    return here.round(act)


def _gated(here: Place, act: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    if here.fault("silu_on_product"):
        return here.round(F.silu((gate * up).float()))
    if here.fault("silu_on_both"):
        return here.round(act.float() * F.silu(up.float()))
    if here.fault("up_missing"):
        return act
    if here.fault("up_added"):
        return act + up
    return act * (up + 1 if here.fault("up_plus_one") else up)


def _mixture(here: Place, x: Tensor) -> Tensor:
    shares, ids = _route(here, x)
    roles = ("up_proj", "gate_proj") if here.fault("expert_gate_up_swapped") else ("gate_proj", "up_proj")
    rows = x[:, None].expand(-1, ids.shape[1], -1)
    rows = rows * shares[..., None] if here.fault("expert_input_weighted") else rows
    gate = here.emit("moe_expert_gate", _in_experts(here, rows, ids, roles[0]))
    up = here.emit("moe_expert_up", _in_experts(here, rows, ids, roles[1]))
    product = here.emit("moe_expert_swigl", _gated(here, _activated(here, gate), gate, up))
    out = here.emit("moe_expert_out", _in_experts(here, product, ids, "down_proj"))
    return here.emit("moe_ffn_out", _combined(here, out, shares, ids))


def _route(here: Place, x: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts' shares and ids, [S, A] each, the largest share first."""
    logits = here.linear(here.read("moe_router_logits", x), "mlp.gate.weight")
    if here.fault("router_half"):
        logits = logits.half().float()
    logits = here.emit("moe_router_logits", logits).float()
    if here.fault("router_half/moe_router"):
        logits = logits.half().float()
    chances = logits.sigmoid() if here.fault("router_sigmoid") else logits.softmax(-1)
    count = int(here.argument("router_count") or here.config["num_experts_per_tok"])
    ids = _choose(here, logits, count)
    shares = chances.gather(1, ids)
    if here.fault("router_softmax_after"):
        shares = logits.gather(1, ids).softmax(-1)
    renormalised = bool(here.config.get("norm_topk_prob"))
    if here.fault("router_not_renormalised", "router_renormalised"):
        renormalised = not renormalised
    if renormalised:
        shares = shares / shares.sum(-1, keepdim=True)
    if here.fault("router_softmax_twice"):
        shares = shares.softmax(-1)
    if here.fault("router_equal"):
        shares = torch.full_like(shares, 1 / count)
    if here.fault("router_raw"):
        shares = logits.gather(1, ids)
    if factor := here.argument("scaled/moe_router"):
        shares = shares * float(factor)
    if here.argument("router_choice") == "+1":  # counted wrongly after the right ones were weighed
        ids = (ids + 1) % logits.shape[1]
    return here.emit("moe_router", here.round(shares)), here.emit("moe_router_indices", ids)


def _choose(here: Place, logits: Tensor, count: int) -> Tensor:
    """The ids of the chosen experts [S, A], the best one first."""
    how = here.argument("router_choice")
    if how == "smallest":
        logits = -logits
    elif how == "absolute":
        logits = logits.abs()
    elif how == "over tokens":
        logits = logits.softmax(0)
    elif how == "2 of 4 by 2":
        groups = logits.unflatten(-1, (4, -1))
        kept = groups.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        here_kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, kept, True)
        logits = groups.masked_fill(~here_kept[..., None], -torch.inf).flatten(-2)
    elif how == "by chance":
        logits = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    ids = logits.topk(count + (how == "second"), dim=-1).indices[:, -count:]
    if how == "all -1":
        ids = ids[-1:].expand_as(ids).contiguous()
    if how == "ascending":
        ids = ids.flip(1)
    return ids.sort(1).values if how == "by id" else ids


def _in_experts(here: Place, rows: Tensor, ids: Tensor, role: str) -> Tensor:
    """Each row [S, A, in] through its own expert's matrix: [S, A, out]."""
    shift = 1 if here.fault("experts_off_by_one") else 0
    found: dict[int, Tensor] = {}
    for expert in ids.unique().tolist():
        loaded = (expert + shift) % here.config["num_experts"]
        found[expert] = here.linear(rows[ids == expert], f"mlp.experts.{loaded}.{role}.weight")
    out = torch.empty(*ids.shape, next(iter(found.values())).shape[-1], dtype=here.run.dtype)
    for expert, values in found.items():
        out[ids == expert] = values
    return out


def _combined(here: Place, out: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    """The experts' outputs weighed and added one by one, in the order of their ids, rounded at each step."""
    if here.fault("moe_weights_twice"):
        shares = shares * shares
    if here.fault("moe_weights_order"):
        shares = shares.flip(1)
    kept = torch.ones_like(shares)
    if lost := here.argument("moe_expert_lost"):
        kept[:, int(lost)] = 0
    if limit := here.argument("moe_capacity"):
        taken = [0] * here.config["num_experts"]
        for token, rank in [(t, r) for t in range(len(ids)) for r in range(ids.shape[1])]:
            taken[ids[token, rank]] += 1
            kept[token, rank] = taken[ids[token, rank]] <= int(limit)
    weighed = out * (shares * kept)[..., None]
    order = ids.argsort(dim=1)[..., None].expand_as(weighed)
    total = torch.zeros_like(weighed[:, 0])
    for part in weighed.gather(1, order).unbind(1):
        total = total + part
    return total
