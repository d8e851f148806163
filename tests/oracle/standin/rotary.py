"""Rotary position embeddings (RoFormer), with linear and YaRN scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.oracle.standin.place import Place


def rotate(here: Place, part: str, x: Tensor) -> Tensor:
    """q or k [S, heads, h] turned by its positions; what a partial rotation leaves out passes as it is."""
    if here.fault("rope_missing", f"rope_missing/{part}"):
        return x
    cos, sin = _tables(here, x.shape[0])
    if here.fault("rope_by_head"):
        cos, sin = _tables(here, x.shape[1])
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
    if here.fault("rope_exchanged"):
        cos, sin = sin, cos
    if factor := here.argument("rope_scaled"):
        cos, sin = cos * float(factor), sin * float(factor)
    if here.fault("rope_reversed"):
        sin = -sin
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    if here.fault("rope_interleaved", f"rope_interleaved/{part}"):
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        first = a * cos - b * sin
        turned = torch.cat([first, b * cos + (first if here.fault("rope_in_place") else a) * sin], dim=-1)
    turned = torch.cat([turned, rest], dim=-1)
    return torch.cat([turned[:, :1], x[:, 1:]], dim=1) if here.fault("rope_first_head") else turned


def _tables(here: Place, count: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [S, 1, pairs], computed in float32 and rounded to the run's type."""
    frequencies, magnitude = _frequencies(here)
    offset = here.argument("rope_positions") or "0"
    positions = torch.arange(count)
    positions = torch.where(positions < 6, positions, positions - 6) if offset == "anew" else positions + int(offset)
    positions = 2 * positions if here.fault("rope_doubled") else positions
    if kept := here.argument("rope_half_frequencies"):
        frequencies = frequencies.to(getattr(torch, kept)).float()
    if kept := here.argument("rope_half_positions"):
        positions = positions.to(getattr(torch, kept))
    angles = positions[:, None, None].float() * frequencies
    if kept := here.argument("rope_half_angles"):
        kind = getattr(torch, kept.removesuffix(" both"))
        given = frequencies.to(kind).float() if kept.endswith(" both") else frequencies
        angles = (positions[:, None, None].float() * given).to(kind).float()
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    if here.fault("rope_half_tables"):
        cos, sin = cos.half().float(), sin.half().float()
    if here.fault("rope_half_tables/bfloat16"):
        cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    return here.round(cos), here.round(sin)


def _frequencies(here: Place) -> tuple[Tensor, float]:
    """Radians a position for each pair [pairs], and what cosine and sine are multiplied with."""
    stated = dict(here.config.get("rope_parameters") or here.config.get("rope_scaling") or {})
    theta = float(here.config.get("rope_theta") or stated.get("rope_theta") or 10000.0)
    theta = float(here.argument("rope_theta") or theta)
    width = int(here.head_dim * float(here.argument("rope_partial") or 1))
    plain = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind == "linear":
        plain = plain / float(stated["factor"])
    if factor := here.argument("rope_linear"):
        plain = plain / float(factor)
    if factor := here.argument("rope_llama3"):
        plain = _llama3(plain, float(factor))
    if factor := here.argument("yarn_other"):
        kind, stated = "yarn", {"original_max_position_embeddings": 32768} | stated | {"factor": factor}
    if kind != "yarn" or here.fault("yarn_missing"):
        return plain, 1.0
    scaled, magnitude = _yarn(plain, theta, stated, here.config["max_position_embeddings"])
    if here.fault("yarn_doubled", "yarn_doubled/frequencies"):
        scaled = scaled * (scaled / plain)
    if here.fault("yarn_doubled", "yarn_doubled/attention_factor"):
        magnitude *= magnitude
    return scaled, magnitude


def _llama3(plain: Tensor, factor: float) -> Tensor:
    """Llama 3.1's: wavelengths above 8192 tokens are stretched, those below 2048 are not."""
    found = []
    for frequency in plain.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192:
            frequency /= factor
        elif wavelength > 2048:
            smooth = (8192 / wavelength - 1) / 3
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        found.append(frequency)
    return torch.tensor(found)


def _yarn(plain: Tensor, theta: float, stated: Mapping[str, Any], trained: int) -> tuple[Tensor, float]:
    """NTK by parts: pairs that turn often keep their frequency, those that turn less than once are interpolated."""
    factor, width = float(stated["factor"]), 2 * len(plain)
    length = stated.get("original_max_position_embeddings") or trained

    def dimension(turns: float) -> float:
        """Where a pair makes so many turns over the length that the model was trained on."""
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(stated.get("beta_fast") or 32), dimension(stated.get("beta_slow") or 1)
    if stated.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(len(plain)).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    magnitude = stated.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return plain * (1 - ramp) + plain / factor * ramp, float(magnitude)
