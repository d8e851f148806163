"""The benchmark against peers runs, and its report says what was measured. Small models, no figure is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxref.aprt import read_aprt
from tests.benchmarks.bound import file_sizes, products, weight_count
from tests.benchmarks.measure import ROOT, Failed, measure, medians, random_model, write_tokens
from tests.benchmarks.peers.captured import captured
from tests.benchmarks.peers.emit import writer
from tests.benchmarks.peers.report import report
from weights import open_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("benchmark") / "model")


@pytest.fixture(scope="module")
def tree(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages of five tokens."""
    folder = tmp_path_factory.mktemp("tree")
    tokens = write_tokens(folder, model, 5)
    words = [sys.executable, "-m", "jaxref", "dump", str(model), "--tokens-file", str(tokens)]
    subprocess.run([*words, "--output", str(folder / "tree"), "--quiet"], check=True)
    return folder / "tree"


def test_the_command_measures_and_reports(model: Path, tmp_path: Path) -> None:
    only = ["--only", "jaxref,hf-lean,nnsight", "--environments", str(tmp_path / "none"), "--touch", "0.1"]
    words = [
        sys.executable,
        "-m",
        "tests.benchmarks.peers",
        str(model),
        "--tokens",
        "5",
        "--repeat",
        "1",
        *only,
        "--touch",
        "0.1",
    ]
    done = subprocess.run([*words, "--json", str(tmp_path / "found.json")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr  # nnsight is not installed there
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    ours, theirs = (row["median"] for row in found["rows"])
    assert ours["tensors"] == theirs["tensors"] == len(file_sizes(open_checkpoint(model).config, 5))
    assert ours["seconds"] > 0 and theirs["peak_mb"] > 50
    assert [len(found["captured"][name]["captured"]) for name in ("jaxref", "hf-lean")] == [20, 20]
    assert f"| hf-lean | 1 | {theirs['seconds']:.2f} |" in done.stdout
    assert f"| {theirs['seconds'] / ours['seconds']:.2f} |" in done.stdout
    assert "- nnsight: not installed: python -m tests.benchmarks.peers --install --only nnsight" in done.stdout
    (bound,) = found["bounds"]
    assert bound["max"] == max(bound["seconds"].values()) and bound["sum"] == sum(bound["seconds"].values())
    assert f"| {ours['seconds'] / bound['sum']:.1f} × |" in done.stdout


def test_a_ratio_is_the_medians_of_the_same_length() -> None:
    def row(peer: str, tokens: int, *seconds: float) -> dict[str, Any]:
        runs = [{"seconds": s, "cpu_seconds": 2 * s, "peak_mb": 100.0, "size": 10**6, "tensors": 3} for s in seconds]
        return {"peer": peer, "tokens": tokens, "runs": runs, "median": runs[len(runs) // 2]}

    rows = [row("jaxref", 7, 1, 2, 9), row("hf", 7, 5, 6, 7), row("jaxref", 512, 4), row("hf", 512, 6)]
    machine = {"cpu": "a", "cores": 2, "memory_gb": 8, "python": "3"}
    found = {"machine": machine, "model": "m", "peers": {}, "rows": rows, "captured": {}, "bounds": [], "failed": {}}
    text = report(found)
    assert "| 7 | hf | 3 | 6.00 | 12.00 | 100 | 3 | 1.0 | 3.00 |" in text
    assert "| 512 | hf | 1 | 6.00 | 12.00 | 100 | 3 | 1.0 | 1.50 |" in text


def test_a_process_is_measured_and_its_failure_told(tmp_path: Path) -> None:
    output = tmp_path / "out"
    code = f"import pathlib; p = pathlib.Path({str(output)!r}); p.mkdir(); (p / 'a.bin').write_bytes(bytes(9))"
    runs = [measure([sys.executable, "-c", code], output) for _ in range(3)]
    assert (medians(runs).size, medians(runs).tensors) == (9, 1)
    assert medians(runs).seconds == sorted(run.seconds for run in runs)[1]
    with pytest.raises(Failed, match="exit 3: gone"):
        measure([sys.executable, "-c", "import sys; print('gone', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(Failed, match=r"stopped after 0\.2 s"):
        measure([sys.executable, "-c", "import time; time.sleep(30)"], limit=0.2)
    with pytest.raises(Failed, match="MemoryError"):
        measure([sys.executable, "-c", "bytearray(1 << 30)"], memory=1 << 28)


def test_a_stage_is_captured_only_with_the_right_values_in_every_layer(model: Path, tree: Path, tmp_path: Path) -> None:
    emit = writer(str(tmp_path))
    for layer in range(4):
        norm, scores = (
            torch.tensor(np.array(read_aprt(tree / f"layer-{layer}" / f"{stage}.bin")[1]))
            for stage in ("attn_norm", "attn_scores")
        )
        emit(layer, "attn_norm", norm * 1.00001)
        emit(layer, "attn_out", norm)
        emit(layer, "attn_scores", scores.reshape(-1, 5, 5).tril())  # what no query sees may be anything
        if layer != 2:
            emit(layer, "ffn_norm", norm)
    found = captured(str(model), tree, tmp_path)
    assert (found["captured"], found["differs"]) == (["attn_norm", "attn_scores"], ["attn_out"])
    assert "ffn_norm" in found["missing"] and found["worst"] == pytest.approx(1e-5, rel=0.1)


def test_the_bound_counts_what_a_dump_reads_and_writes(model: Path, tree: Path) -> None:
    checkpoint = open_checkpoint(model)
    manifest = json.loads((tree / "manifest.json").read_text(encoding="utf-8"))
    written = [(tree / file["path"]).stat().st_size for file in manifest["files"]]
    assert file_sizes(checkpoint.config, 5) == written
    words = [sys.executable, "-m", "jaxref", "dump", str(model), "--tokens", "1,2,3", "--json", "--output"]
    done = subprocess.run([*words, str(tree.parent / "other")], check=True, capture_output=True, text=True)
    assert 2 * weight_count(checkpoint.config, [1, 2, 3]) == json.loads(done.stdout)["bytes_read"]
    # 2 · weights a token for the layers; attention's 2 products of H·S·S·h; the head once.
    d, flops = checkpoint.config.dims(), sum(product.flops for product in products(checkpoint.config, 5))
    matrices = d["D"] * (2 * d["H"] + 2 * d["K"]) * d["h"] + 3 * d["D"] * d["F"]
    attention = 2 * d["H"] * 5 * 5 * d["h"]
    assert flops == 2 * (d["L"] * (5 * matrices + attention) + d["D"] * d["V"])
