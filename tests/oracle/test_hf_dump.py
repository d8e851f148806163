"""`python -m oracle hf`: the tree of a dump, out of transformers' own modules, which it does not disturb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import PROMPT
from tests.trees import distance, read_tree, write_tree

torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxref[hf]'")
hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")

ROOT = Path(__file__).parent.parent.parent
TOKENS = ",".join(map(str, PROMPT))
DTYPES = ["float16", "bfloat16", "float32"]


def oracle_hf(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "oracle", "hf", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moe"])
def test_the_tree_has_the_files_and_the_manifest_of_a_dump(zoo, tmp_path: Path, name: str) -> None:
    done = oracle_hf(zoo(name), "--tokens", TOKENS, "--dtype", "float32", "--output", tmp_path / "hf", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    write_tree(zoo(name), tmp_path / "ours", list(PROMPT))
    theirs, ours = read_tree(tmp_path / "hf"), read_tree(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert max(distance(theirs[path], ours[path]) for path in ours if "indices" not in path) <= 3e-5
    a, b = (json.loads((tmp_path / tree / "manifest.json").read_text()) for tree in ("hf", "ours"))
    assert (a["producer"], a["dtype"]) == ("huggingface", "float32")
    assert {"torch", "transformers"} <= a["versions"].keys()
    assert [(f["path"], f["shape"], f["axes"]) for f in a["files"]] == [
        (f["path"], f["shape"], f["axes"]) for f in b["files"]
    ]
    assert (a["tokens"], a["weights"], a["config"]) == (b["tokens"], b["weights"], b["config"])


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moe", "moe-sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_capture_keeps_the_bits_of_the_logits(zoo, name: str, dtype: str) -> None:
    model, seen = hf.load(zoo(name), dtype), []
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([list(PROMPT)]), use_cache=False).logits[0]
    watched = hf.run(model, list(PROMPT), lambda layer, stage, value: seen.append(stage))
    assert torch.equal(plain, watched)
    assert "post_attn_residual" in seen
    with torch.no_grad():
        again = model(input_ids=torch.tensor([list(PROMPT)]), use_cache=False).logits[0]
    assert torch.equal(plain, again)


def test_bfloat16_is_kept_in_safetensors(zoo, tmp_path: Path) -> None:
    words = ["--tokens", TOKENS, "--dtype", "bfloat16", "--format", "safetensors", "--output", tmp_path / "hf"]
    assert oracle_hf(zoo("moe"), *words).returncode == 0
    (values,) = load_file(tmp_path / "hf" / "layer-0" / "attn_out.safetensors").values()
    assert values.dtype.name == "bfloat16"
    (indices,) = load_file(tmp_path / "hf" / "layer-0" / "moe_router_indices.safetensors").values()
    assert indices.dtype == np.int32


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/nowhere"], "no such model"),
        (["--stages", "q_norm"], "qwen2 has no stage q_norm"),
        (["--dtype", "float64"], "'float64' is not one of"),
        (["--device", "cuda"], "torch finds no CUDA device"),
        (["--tokens", "999999"], "outside the vocabulary"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, words: list[str], says: str) -> None:
    done = oracle_hf(*words, "--output", tmp_path / "tree")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []
