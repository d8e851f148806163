"""Compare of two large trees: peak memory and throughput, of a whole process from its start to its end.

    python -m tests.benchmarks.compare_speed [--gigabytes 4] [--three] [--folder DIR]

Writes the trees (all stages of a 0.5B shape, 1024 tokens) into a scratch folder first. By hand, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxref.aprt import aprt_header
from jaxref.stages import stages_of
from jaxref.tree import stage_path
from tests.benchmarks.measure import measure, medians
from weights import Config, config_from_dict
from weights.tiny import tiny_config

TOKENS = 1024


def write_trees(root: Path, names: list[str], size: float) -> float:
    """Trees of about `size` bytes that differ as float16 runs do; returns the bytes of one."""
    raw = tiny_config("qwen2", "0.5b")
    layer = 4 * sum(
        np.prod(stage.shape(config_from_dict(raw), TOKENS)) for stage in stages_of(config_from_dict(raw), 1)
    )
    config = config_from_dict(raw | {"num_hidden_layers": max(1, round(size / layer))})
    rng, written = np.random.default_rng(0), 0
    for index in range(config.num_hidden_layers):
        for stage in stages_of(config, index):
            shape = stage.shape(config, TOKENS)
            values = rng.standard_normal(np.prod(shape), dtype=np.float32)
            for place, name in enumerate(names):
                path = root / name / stage_path(index, stage.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                noisy = values if place == 0 else (values * np.float32(1 + 1e-4 * place)).astype(np.float16)
                path.write_bytes(aprt_header(index, shape) + noisy.astype("<f4").tobytes())
            written += values.nbytes
    for place, name in enumerate(names):
        _write_manifest(root / name, config, "float16" if place else "float32")
    return written


def _write_manifest(folder: Path, config: Config, dtype: str) -> None:
    facts = {
        "schema": "jaxref-tree-v1",
        "config": config.to_json(),
        "tokens": [0] * TOKENS,
        "dtype": dtype,
        "files": [],
    }
    (folder / "manifest.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--three", action="store_true", help="with a yardstick as well")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = ["reference", "test", "hf"][: 3 if options.three else 2]
    if options.write:
        print(write_trees(options.folder, names, options.gigabytes * 1e9))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        # Written by another process, whose memory does not count.
        again = [sys.executable, "-m", "tests.benchmarks.compare_speed", "--write", "--folder", scratch]
        again += ["--gigabytes", str(options.gigabytes), *(["--three"] if options.three else [])]
        size = float(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        trees = [f"{scratch}/{name}" for name in names]
        command = [
            sys.executable,
            "-m",
            "oracle",
            "compare",
            *trees[:2],
            *(["--hf", trees[2]] if options.three else []),
        ]
        run = medians([measure(command, accept=(0, 1)) for _ in range(options.repeat)])
        print(f"{len(names)} trees of {size / 1e9:.2f} GB: {run.seconds:.1f} s", end=", ")
        print(f"{size / run.seconds / 1e9:.2f} GB/s a tree, {run.peak_mb:.0f} MB peak")


if __name__ == "__main__":
    main()
