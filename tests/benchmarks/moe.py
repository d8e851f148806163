"""A checkpoint of the 30B-A3B layer shapes: `python -m jaxref dump` against Hugging Face loading and running it.

    python -m tests.benchmarks.moe [--folder DIR] [--layers 2,4,8] [--hf 4]

Prints for each depth the wall time, peak memory and bytes read, what the chosen experts and the rest come to, and the
extrapolation to 48 layers. The checkpoints (1.2 GB a layer) are made in DIR and kept. Run it by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxref.aprt import read_aprt
from tests.benchmarks.dump_vs_hf import commands, measure
from weights import Config, open_checkpoint
from weights.names import EXPERTS, layer_rows, model_shapes

TOKENS = "3838,374,220,17,10,17,30"
BF16 = 2


def make(folder: Path, layers: int) -> Path:
    model = folder / f"30b-a3b-{layers}"
    if not (model / "config.json").exists():
        words = ["tiny", str(model), "--arch", "qwen3_moe", "--like", "30b-a3b", "--layers", str(layers)]
        subprocess.run([sys.executable, "-m", "weights", *words], check=True)
    return model


def needed(config: Config, tree: Path) -> int:
    """Bytes of the chosen experts and of everything else that a dump must read, by the indices that it wrote."""
    size = sum(math.prod(row.shape(config)) for i in range(config.num_hidden_layers) for row in layer_rows(config, i))
    expert = sum(math.prod(row.shape(config)) for row in EXPERTS)
    for layer in range(config.num_hidden_layers):
        _, indices = read_aprt(tree / f"layer-{layer}" / "moe_router_indices.bin")
        size += expert * len(np.unique(indices))
    shapes = model_shapes(config)
    rows = len(set(TOKENS.split(",")))
    size += rows * config.hidden_size + config.hidden_size + math.prod(shapes["lm_head.weight"])
    return size * BF16


def ours(model: Path, output: Path) -> tuple[float, float]:
    """Print one depth; seconds and peak MB."""
    command = [*commands(model, TOKENS, output)["jaxref dump"], "--positions", "all"]
    seconds, memory, _ = measure(command, output)
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    read = json.loads(again.stdout)["bytes_read"]
    checkpoint = open_checkpoint(model)
    total = sum(file["size"] for file in checkpoint.identity())
    bound = needed(checkpoint.config, output)
    print(
        f"{checkpoint.config.num_hidden_layers:3} layers  jaxref dump {seconds:6.2f} s  {memory:6.0f} MB peak", end="  "
    )
    print(f"{read / 1e9:.3f} GB read of {total / 1e9:.1f} GB; chosen experts and the rest: {bound / 1e9:.3f} GB")
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--hf", type=int, default=4, help="at which depth Hugging Face runs too; 0: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, tree, times = options.folder or Path(scratch), Path(scratch) / "tree", {}
        for layers in map(int, options.layers.split(",")):
            times[layers], _ = ours(make(folder, layers), tree)
            if layers == options.hf:
                command = commands(folder / f"30b-a3b-{layers}", TOKENS, tree)["HF eager + hooks"]
                seconds, memory, _ = measure(command, tree)
                ratio = seconds / times[layers]
                print(f"{layers:3} layers  HF {seconds:15.2f} s  {memory:6.0f} MB peak  ratio {ratio:.1f}")
        slope, start = np.polyfit(list(times), list(times.values()), 1)
        print(f"{slope:.2f} s a layer, {start:.2f} s besides; 48 layers: {48 * slope + start:.0f} s")


if __name__ == "__main__":
    main()
