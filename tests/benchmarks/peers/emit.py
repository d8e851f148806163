"""How the peers' programs write a tensor: as jaxref does, so that files can be compared. Imports nothing of ours."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import torch

Emit = Callable[[int | None, str, torch.Tensor], None]  # layer (None: whole model), stage, [1, …] or […]


def writer(folder: str) -> Emit:
    """A function that writes one stage below `folder`: 12 bytes of header, then its values as float32."""

    def emit(layer: int | None, stage: str, value: torch.Tensor) -> None:
        value = value[-1:] if stage == "lm_head" else value
        path = Path(folder) / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer is None else layer, value.numel()))
            file.write(value.detach().to(torch.float32).contiguous().numpy().data)

    return emit


def heads_last(value: torch.Tensor) -> torch.Tensor:
    """[1, H, S, h] → [S, H·h]."""
    return value[0].transpose(0, 1).flatten(1)


def read_tokens(path: str) -> torch.Tensor:
    """[1, S] of the ids in a file."""
    return torch.tensor([[int(word) for word in Path(path).read_text(encoding="utf-8").split(",")]])
