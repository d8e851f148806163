"""Numbers kept in eight bits or fewer, as ggml, W8A8 kernels and float8 engines keep them, in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def unpacked(values: np.ndarray, how: str) -> np.ndarray:
    """Rows [..., n] of weights that share bytes two by two, `ORDER of BLOCK`, as a wrong unpacking gives them back."""
    order, _, size = how.partition(" of ")
    half = int(size) // 2
    found = np.empty_like(values)
    for start in range(0, values.shape[-1], 2 * half):
        for byte in range(half):
            first, second = start + byte, start + half + byte
            pair = start + 2 * byte, start + 2 * byte + 1
            # Packed as (low, high), and where each of them lands.
            low, high = pair if order == "halves" else (first, second)
            to = {"turns": pair, "halves": (first, second), "exchanged": (second, first)}[order]
            found[..., to[0]], found[..., to[1]] = values[..., low], values[..., high]
    return found


def kept(x: Tensor, kind: str) -> Tensor:
    """What is left of rows [..., n] in this type: one of torch's, `T tensor`, `T rows`, `int8`, `Q8_0`, `Q4_0`."""
    x = x.float()
    if kind == "int8":
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.where(scale == 0, 0, (x / scale).round() * scale)
    if kind.startswith("Q"):
        block = x.unflatten(-1, (-1, 32))
        return (_q8_0(block) if kind == "Q8_0" else _q4_0(block)).flatten(-2)
    name, _, over = kind.partition(" ")
    dtype = getattr(torch, name)
    if not over:
        return x.to(dtype).float()
    greatest = x.abs().amax(-1, keepdim=True) if over == "rows" else x.abs().amax()
    scale = greatest / torch.finfo(dtype).max
    return torch.where(scale == 0, 0, (x / scale).to(dtype).float() * scale)


def _q8_0(block: Tensor) -> Tensor:
    """`quantize_row_q8_0_ref` of ggml-quants.c: whole numbers up to 127 and a float16 scale."""
    scale = block.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (block * inverse).round() * scale.half().float()


def _q4_0(block: Tensor) -> Tensor:
    """`quantize_row_q4_0_ref`: the value of greatest magnitude becomes -8; halves are rounded up by cutting off."""
    greatest = block.gather(-1, block.abs().argmax(-1, keepdim=True))
    scale = greatest / -8
    inverse = torch.where(scale == 0, 0, 1 / scale)
    whole = (block * inverse + 8.5).trunc().clamp(max=15) - 8
    return whole * scale.half().float()
