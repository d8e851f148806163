"""Grouped-query attention, from the normed hidden state to the output projection."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.standin.norms import head_norm
from tests.oracle.standin.place import Place
from tests.oracle.standin.rotary import rotate

PARTS = ("q", "k", "v")


def attend(here: Place, x: Tensor) -> Tensor:
    """The attention branch [S, D] of one layer."""
    q, k, v = (part.unflatten(-1, (-1, here.head_dim)) for part in _project(here, here.read("qkv_matmul", x)))
    v, before = (k if here.fault("input_other/attention/k") else v), v
    q, k = _turn(here, "q", q), _turn(here, "k", before if here.fault("input_other/k_post_rope/v") else k)
    k, v = _cached(here, "k", k), _cached(here, "v", v)
    v = rotate(here, "v", v) if here.fault("v_rotated") else v
    q, k, v = _untransposed(here, "q", q), _untransposed(here, "k", k), _untransposed(here, "v", v)
    scores = here.emit("attn_scores", _scores(here, q, k))
    chances = here.emit("attn_softmax", _softmax(here, scores))
    mixed = torch.einsum("jqk,kjd->qjd", chances.float(), v[:, _kv_head(here, "v_heads")].float())
    mixed = mixed.transpose(0, 1).reshape(mixed.shape) if here.fault("attention_unmerged") else mixed
    mixed = mixed.flip(1) if here.fault("attention_head_order/reversed") else mixed
    mixed = mixed.roll(1, 1) if here.fault("attention_head_order/other") else mixed
    mixed = mixed.transpose(1, 2) if here.fault("attention_unmerged/h-major") else mixed
    mixed = here.emit("attention", here.round(mixed.flatten(1)))
    return here.emit("attn_out", _output(here, mixed))


def _cached(here: Place, part: str, x: Tensor) -> Tensor:
    """k, v or what is written of k as a cache keeps it."""
    if place := here.argument(f"kv_cache_shifted/{part}"):
        step, _, zeros = place.partition(" ")
        x = x.roll(int(step), 0)
        if zeros:
            x[0 if int(step) > 0 else -1] = 0
    kind = here.argument(f"kv_cache_rounded/{part}")
    if kind == "int8":
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return here.round((x.float() / scale).round() * scale)
    return here.round(x.to(getattr(torch, kind))) if kind else x


def _untransposed(here: Place, part: str, x: Tensor) -> Tensor:
    """[S, heads, h], as it is read where somebody forgot to exchange tokens and heads, or did it twice."""
    if here.fault(f"heads_untransposed/{part}"):
        return x.contiguous().view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    return x.transpose(0, 1).reshape(x.shape) if here.fault(f"heads_untransposed/{part}/back") else x


def _project(here: Place, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v; a bias is added before anything is rounded."""
    order = here.argument("qkv_order") or "qkv"
    roles = [f"self_attn.{part}_proj" for part in PARTS]
    taken = dict(zip(PARTS, order, strict=True))
    parts = [here.product(x, f"self_attn.{taken[part]}_proj.weight") for part in PARTS]
    widths = [part.shape[-1] for part in parts]
    parts[0] = parts[0] * here.head_dim**-0.5 if here.fault("qkv_scaled/q") else parts[0]
    fused = torch.cat(parts, dim=-1)
    if here.fault("qkv_grouped/flat"):
        q, k, v = (part.unflatten(-1, (here.kv_heads, -1)) for part in fused.split(widths, dim=-1))
        fused = torch.cat([q, k, v], dim=-1).flatten(-2)
    row = here.emit("qkv_matmul", fused)
    if here.has("self_attn.q_proj.bias"):
        bias = torch.cat(
            [_bias(here, part, here.weight(f"{role}.bias")) for part, role in zip(PARTS, roles, strict=True)]
        )
        if here.fault("bias_first_alone/token"):
            bias = torch.stack([bias, *[torch.zeros_like(bias)] * (len(row) - 1)])
        row = here.emit("qkv_bias", here.round(row + bias))
    return here.round(row).split(widths, dim=-1)


def _bias(here: Place, part: str, bias: Tensor) -> Tensor:
    if here.fault("bias_missing", f"bias_missing/{part}") or (part != "q" and here.fault("bias_q_only")):
        return torch.zeros_like(bias)
    if here.fault("bias_exchanged") and part != "q":
        bias = here.weight(f"self_attn.{'v' if part == 'k' else 'k'}_proj.bias")
    if part != "v" and here.fault("bias_permuted/halves"):
        bias = bias.view(-1, 2, here.head_dim // 2).transpose(1, 2).flatten()
    if here.fault("bias_first_alone/head"):
        bias = bias[: here.head_dim].repeat(len(bias) // here.head_dim)
    if here.fault("bias_neighbour"):
        bias = here.neighbour_weight(f"self_attn.{part}_proj.bias")
    if here.fault("bias_sign"):
        bias = -bias
    return bias.float() * (2 if here.fault("bias_doubled") else 1)


def _turn(here: Place, part: str, x: Tensor) -> Tensor:
    """q or k [S, heads, h] through its head norm, where the model has one, and through RoPE."""
    stage = f"{part}_norm"
    normed = x
    if here.has(f"self_attn.{part}_norm.weight"):
        normed = here.emit(stage, head_norm(here, stage, x).flatten(1)).view_as(x)
    if here.fault("rope_before_norm"):
        turned = head_norm(here, stage, rotate(here, part, x))
    else:
        turned = rotate(here, part, normed)
    turned = _cached(here, f"{part}_post_rope", turned)
    return here.emit(f"{part}_post_rope", turned.flatten(1)).view_as(x)


def _kv_head(here: Place, what: str) -> Tensor:
    """The kv head that each query head reads [H]."""
    head = torch.arange(here.heads)
    if here.fault(f"{what}_modulo"):
        return head % here.kv_heads
    group = head // (here.heads // here.kv_heads)
    if here.fault(f"{what}_other"):
        return (head + 1) // (here.heads // here.kv_heads) % here.kv_heads
    if here.fault(f"{what}_next"):
        return (group + 1) % here.kv_heads
    return here.kv_heads - 1 - group if here.fault(f"{what}_reversed") else group


def _scores(here: Place, q: Tensor, k: Tensor) -> Tensor:
    """Scaled products [H, S, S] of every query with every key, rounded before and after the scaling."""
    raw = here.round(torch.einsum("qjd,kjd->jqk", q.float(), k[:, _kv_head(here, "kv_heads")].float()))
    if here.fault("scores_overflow"):
        return here.round(raw.half().float() * here.head_dim**-0.5)
    if here.fault("scores_unscaled"):
        return raw
    if here.fault("scores_hidden_dim"):
        return raw / here.config["hidden_size"] ** 0.5
    if limit := here.argument("scores_capped/attn_scores"):
        return here.round(float(limit) * (raw.float() * here.head_dim**-0.5 / float(limit)).tanh())
    if factor := here.argument("scores_scaled"):
        return here.round(raw.float() * here.head_dim**-0.5 * float(factor))
    if here.fault("scores_head_dim"):
        return raw / here.head_dim
    width = here.config["hidden_size"] // here.heads if here.fault("scores_model_dim") else here.head_dim
    return raw * width**-0.5


def _softmax(here: Place, scores: Tensor) -> Tensor:
    """Over the keys that each query may see, in float32, then rounded."""
    scores, seen = scores.float(), _visible(here, scores.shape[-1])
    if limit := here.argument("scores_capped/attn_softmax"):
        scores = float(limit) * (scores / float(limit)).tanh()
    if factor := here.argument("softmax_temperature"):
        scores = scores * float(factor)
    if here.fault("softmax_mean"):
        return here.round((seen / seen.sum(-1, keepdim=True)).expand_as(scores))
    if kind := here.argument("softmax_overflow"):
        powers = scores.masked_fill(~seen, -torch.inf).exp().to(getattr(torch, kind)).float()
        return here.round(powers / powers.sum(-1, keepdim=True).to(getattr(torch, kind)).float())
    if here.fault("softmax_undivided"):
        return here.round((scores - scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)).exp() * seen)
    if here.fault("softmax_masked_after"):
        return here.round(scores.softmax(-1) * seen)
    if here.fault("softmax_plus_one"):
        sink = torch.zeros_like(scores[..., :1])
        return here.round(torch.cat([scores.masked_fill(~seen, -torch.inf), sink], dim=-1).softmax(-1)[..., :-1])
    if value := here.argument("mask_value"):
        return here.round(scores.masked_fill(~seen, float(value)).softmax(-1))
    if kind := here.argument("softmax_unrescaled"):
        return here.round(_online(scores.masked_fill(~seen, -torch.inf), *kind.split()))
    axis = -2 if here.fault("softmax_query_axis") else -1
    return here.round(scores.masked_fill(~seen, -torch.inf).softmax(axis))


def _online(scores: Tensor, block: str, rescaled: str) -> Tensor:
    """Softmax as flash attention runs over blocks of keys, forgetting to rescale what it has so far."""
    greatest = torch.full_like(scores[..., :1], -torch.inf)
    total, parts = torch.zeros_like(greatest), []
    for some in scores.split(int(block), dim=-1):
        new = torch.maximum(greatest, some.amax(-1, keepdim=True))
        powers, shrink = (some - new).exp(), (greatest - new).exp()
        total = total * (shrink if rescaled == "sum" else 1) + powers.sum(-1, keepdim=True)
        parts = [part * (shrink if rescaled == "output" else 1) for part in parts] + [powers]
        greatest = new
    return torch.cat(parts, dim=-1) / total


def _visible(here: Place, count: int) -> Tensor:
    """Which keys a query sees [query, key]."""
    back = torch.arange(count)[:, None] - torch.arange(count)  # how many positions the key lies back
    if here.fault("mask_missing"):
        return torch.ones_like(back, dtype=torch.bool)
    if here.fault("mask_strict"):
        seen = back > 0
        seen[0, 0] = True  # or its softmax would be over nothing
        return seen
    seen = back >= (-1 if here.fault("mask_ahead") else 0)
    seen = _pattern(here, seen, torch.arange(count))
    window = _window(here)
    return seen if window is None else seen & (back < window)


def _pattern(here: Place, seen: Tensor, place: Tensor) -> Tensor:
    """A causal mask that is not quite one."""
    if first := here.argument("mask_hidden"):
        return seen & ((place >= int(first)) | (place[:, None] == place))
    if size := here.argument("mask_tail"):
        return seen & (place < len(place) // int(size) * int(size))
    if size := here.argument("mask_chunks"):
        return seen & (place[:, None] // int(size) == place // int(size))
    if start := here.argument("mask_documents"):
        return seen & ((place[:, None] < int(start)) == (place < int(start)))
    if end := here.argument("mask_prefix"):
        return seen | (place < int(end))
    if here.fault("mask_other"):
        return seen & (place % 5 != 3)
    return seen


def _window(here: Place) -> int | None:
    """How many positions this layer sees, itself included; None where it sees all."""
    if planted := here.argument("window"):
        return None if planted == "none" else int(planted)
    config = here.config
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return None
    kinds = config.get("layer_types")
    first = 0 if config["model_type"] == "qwen3_moe" else config.get("max_window_layers", 28)
    sliding = kinds[here.number] == "sliding_attention" if kinds else here.number >= first
    return config["sliding_window"] if sliding else None


def _output(here: Place, mixed: Tensor) -> Tensor:
    by_head = mixed.unflatten(-1, (here.heads, here.head_dim))
    if here.fault("o_proj_head_order/reversed"):
        mixed = by_head.flip(1).flatten(1)
    if here.fault("o_proj_head_order/unmerged"):
        mixed = by_head.transpose(0, 1).reshape(mixed.shape)
    if here.fault("o_proj_head_order/transposed"):
        mixed = by_head.transpose(1, 2).flatten(1)
    out = here.product(mixed, "self_attn.o_proj.weight")
    if here.fault("o_proj_bias/random"):
        out = out + 0.5 * torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(11))
    if here.fault("o_proj_bias/q_bias"):
        out = out + here.weight("self_attn.q_proj.bias")[: out.shape[-1]].float()
    return here.round(out)
