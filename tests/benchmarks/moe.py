"""A checkpoint of the 30B-A3B layer shapes: `python -m jaxref dump` against Hugging Face loading and running it.

    python -m tests.benchmarks.moe [--folder DIR] [--layers 2,4,8] [--hf 4]

Prints for each depth the wall time, peak memory and bytes read, what the chosen experts and the rest come to, and the
extrapolation to 48 layers. The checkpoints (1.2 GB a layer) are made in DIR and kept. Run it by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from jaxref.aprt import read_aprt
from tests.benchmarks.measure import Run, dump_command, lean_command, measure, medians, random_model
from weights import Config, open_checkpoint
from weights.names import EXPERTS, layer_rows, model_shapes

TOKENS = "3838,374,220,17,10,17,30"
BF16 = 2
TOUCH = 6.0  # GB
REPEAT = 3


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


def ours(model: Path, tokens: Path, output: Path) -> Run:
    """Measure and print one depth."""
    command = [*dump_command(model, tokens, output), "--positions", "all"]
    # First one that is not measured, since it compiles.
    first = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    read = json.loads(first.stdout)["bytes_read"]
    run = medians([measure(command, output, touch=TOUCH) for _ in range(REPEAT)])
    checkpoint = open_checkpoint(model)
    total = sum(file["size"] for file in checkpoint.identity())
    bound = needed(checkpoint.config, output)
    print(f"{checkpoint.config.num_hidden_layers:3} layers  jaxref dump {run.seconds:6.2f} s", end="  ")
    print(f"{run.peak_mb:6.0f} MB peak  {read / 1e9:.3f} GB read of {total / 1e9:.1f} GB", end="; ")
    print(f"chosen experts and the rest: {bound / 1e9:.3f} GB")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--hf", type=int, default=4, help="at which depth Hugging Face runs too; 0: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, tree, times = options.folder or Path(scratch), Path(scratch) / "tree", {}
        tokens = Path(scratch) / "tokens"
        tokens.write_text(TOKENS, encoding="utf-8")
        for layers in map(int, options.layers.split(",")):
            shape = ("--arch", "qwen3_moe", "--like", "30b-a3b", "--layers", str(layers))
            model = random_model(folder / f"30b-a3b-{layers}", *shape)
            shutil.rmtree(tree, ignore_errors=True)
            times[layers] = ours(model, tokens, tree).seconds
            if layers == options.hf:
                run = measure(lean_command(model, tokens, tree), tree, touch=3 * TOUCH)
                ratio = run.seconds / times[layers]
                print(f"{layers:3} layers  HF {run.seconds:15.2f} s  {run.peak_mb:6.0f} MB peak  ratio {ratio:.1f}")
        slope, start = np.polyfit(list(times), list(times.values()), 1)
        print(f"{slope:.2f} s a layer, {start:.2f} s besides; 48 layers: {48 * slope + start:.0f} s")


if __name__ == "__main__":
    main()
