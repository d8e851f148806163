"""The script around the GPU tests, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np

from tests.commands import ROOT
from tests.gpu.models import write_fast
from tests.gpu.table import figures
from weights import open_checkpoint


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_2() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.gpu.all"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no GPU to test on: --device cuda: JAX finds none")
    assert len(done.stderr.splitlines()) == 1


def test_the_fast_checkpoints_are_whole_and_tame(tmp_path) -> None:
    folder = write_fast(tmp_path / "model", "0.5b", num_hidden_layers=2, vocab_size=5000)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.num_hidden_layers == 2
    for name in checkpoint.tensor_names:
        values = np.asarray(checkpoint.tensor(name), np.float32)
        assert np.isfinite(values).all() and values.std() > 0, name
    layers = [jax.tree.leaves(checkpoint.layer(i)) for i in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*layers, strict=True))


def test_products_are_timed() -> None:
    words = [sys.executable, "-m", "tests.gpu.bench", "products", "--device", "cpu", "--repeat", "1", "--tokens", "7,9"]
    found = json.loads(subprocess.run(words, capture_output=True, cwd=ROOT, check=True).stdout)
    assert list(found) == [f"{name}, {n} tokens" for n in (7, 9) for name in ("gate_proj", "down_proj")]
    assert all(times["stored"] > 0 and times["float32"] > 0 for times in found.values())


def test_the_table() -> None:
    """28 GB of parameters at 2.8 TB/s are 10 ms: 20 ms are half of the bound, a fifth of 100 ms."""
    times = {"resident": 0.02, "home": 0.03}
    sides = {
        "session": {"load": 9.0, "parameters": 28e9, "7": times, "peak": 30e9},
        "jit": None,
        "hf": {"7": {"resident": 0.1, "home": 0.2}, "peak": None},
        "processes": {"jaxref dump": 12.0, "oracle hf": None},
    }
    models = {"bandwidth": {"bytes_a_second": 2.8e12}, "7b": sides, "left out": ["jit: no time"]}
    lines = list(figures({"machine": {"card": "some card"}, "tests": "passed", "models": models}))
    assert lines[:3] == ["card some card", "tests: passed", "device memory: 2800 GB/s read and written"]
    text = [" ".join(line.split()) for line in lines]
    assert "7 Session.forward 20.00 ms 30.00 ms 5.00 50% 30.0 GB" in text
    assert "7 jit(forward) not measured" in text
    assert "7 HF eager + hooks 100.00 ms 200.00 ms 1.00 10% -" in text
    assert "whole process, 7 tokens: oracle hf -" in text
    assert lines[-1] == "left out: jit: no time"
