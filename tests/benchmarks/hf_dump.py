"""The other side of `dump_vs_hf.py`: Hugging Face eager float32, each stage written as soon as a hook has it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from jaxref.aprt import aprt_header
from oracle import hf

LAST = ("lm_head",)  # stages of which the last position alone is written


def main(model: str, tokens: str, output: str) -> None:
    folder = Path(output)

    def emit(layer: int | None, stage: str, value: torch.Tensor) -> None:
        value = value[-1:] if stage in LAST else value
        path = folder / ("" if layer is None else f"layer-{layer}") / f"{stage}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(aprt_header(layer, tuple(value.shape)))
            file.write(value.to(torch.float32).contiguous().numpy().data)

    hf.run(hf.load(model), [int(word) for word in tokens.split(",")], emit)


if __name__ == "__main__":
    main(*sys.argv[1:])
