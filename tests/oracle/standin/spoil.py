"""Damage that has no cause to name: one head scaled, noise, saturation, a lost token, a shifted channel, a NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.oracle.standin.place import Place

TOKEN, CHANNEL, HEAD = 3, 5, 1  # where it is done


def spoil(here: Place, stage: str, x: Tensor) -> Tensor:
    """A stage's output [S, …] with the damage planted at `NAME/STAGE`; the same tensor where there is none."""
    if here.fault(f"head_scaled/{stage}"):
        x = x.clone()
        x[..., HEAD * here.head_dim : (HEAD + 1) * here.head_dim] *= 1.01
    if here.fault(f"noise/{stage}"):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        x = (x.float() * (1 + 0.01 * noise)).to(x.dtype)
    if order := here.argument(f"rows_moved/{stage}"):
        count = torch.arange(len(x))
        orders = {
            "all 0": 0 * count,
            "reversed": count.flip(0),
            "+1": count.roll(1),
            "-1": (count + 1).clamp(max=len(x) - 1),
        }
        x = x[orders.get(order, torch.where(count == TOKEN, TOKEN + 2, count))]
    if dtype := here.argument(f"stored_half/{stage}"):
        x = x.to(getattr(torch, dtype)).float()
    if limit := here.argument(f"saturation/{stage}"):
        x = x.clamp(-float(limit), float(limit))
    if here.fault(f"token_zeroed/{stage}"):
        x = x.clone()
        x[TOKEN] = 0
    if here.fault(f"channel_offset/{stage}"):
        x = x.clone()
        x[..., CHANNEL] += 0.5
    if here.fault(f"nan_value/{stage}"):
        x = x.clone()
        x[TOKEN, ..., CHANNEL] = torch.nan
    return x
