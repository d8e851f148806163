"""Planted faults: one stage of some layers is wrong, all else is what it should be, and explain gives the name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oracle.explain import explain
from oracle.hypotheses import about
from oracle.plant import names
from tests.commands import command, refused
from tests.conftest import prompt
from tests.trees import read_tree
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

TOKENS = ",".join(map(str, prompt(19, 272)))
PLANTED = [
    ("qwen2", "embedding_scaled", "all", "float32"),
    ("qwen2", "bias_missing", "2", "float16"),
    ("qwen2", "rope_interleaved", "all", "float32"),
    ("qwen2", "mask_strict", "0..2", "float32"),
    ("qwen3", "head_norm_row", "1", "float16"),
    ("qwen3", "final_norm_missing", "all", "float32"),
    ("qwen3", "gate_up_swapped", "1", "bfloat16"),
    ("qwen2", "rope_linear", "1", "float32"),
    ("qwen3", "rope_llama3", "0..2", "float32"),  # a thousandth, which half precision hides
    ("qwen3_moe", "experts_off_by_one", "2", "float32"),
    ("qwen3_moe", "moe_weights_twice", "all", "float16"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for arch in ("qwen2", "qwen3", "qwen3_moe"):
        write_random(root / arch, tiny_config(arch, None, 3), seed=3)
    return root


@pytest.mark.parametrize(("arch", "fault", "at", "dtype"), PLANTED)
def test_explain_names_what_was_planted(
    models: Path, tmp_path: Path, arch: str, fault: str, at: str, dtype: str
) -> None:
    words = (
        "--tokens",
        TOKENS,
        "--positions",
        "all",
        "--dtype",
        dtype,
        "--fault",
        fault,
        "--at",
        at,
        "--output",
        tmp_path,
    )
    done = command("plant", models / arch, *words, "--quiet", module="oracle")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "manifest.json").read_text())["planted"] == fault
    told = explain(open_checkpoint(models / arch), tmp_path)
    struck = {f.stage for f in told.found.faults}
    assert struck and all(any(row.name == fault for row in about(stage)) for stage in struck)
    assert {c.explanation and c.explanation.hypothesis for c in told.causes} == {fault}
    layers = {"all": {0, 1, 2}, "0..2": {0, 1}}.get(at) or {int(at)}
    # An embedding is in the first layer alone, a mixture of experts in some.
    assert {layer for f in told.found.faults for layer in f.layers} <= layers | {None}


def test_the_other_stages_of_a_planted_tree_are_the_dumps(models: Path, tmp_path: Path) -> None:
    common = (models / "qwen2", "--tokens", TOKENS)
    assert command("plant", *common, "--at", "2", "--output", tmp_path / "a", module="oracle").returncode == 0
    assert command("dump", *common, "--output", tmp_path / "b").returncode == 0
    planted, clean = read_tree(tmp_path / "a"), read_tree(tmp_path / "b")
    assert planted.keys() == clean.keys()
    same = [path for path in clean if planted[path].tobytes() == clean[path].tobytes()]
    assert {path for path in clean if path.startswith(("layer-0", "layer-1"))} <= set(same)
    assert "layer-2/q_post_rope.bin" not in same and "layer-2/qkv_bias.bin" in same


def test_what_cannot_be_planted_is_one_line(tmp_path: Path) -> None:
    line = refused("plant", "tiny", "--fault", "rope", "--output", tmp_path / "t", module="oracle")
    assert all(name in line for name in names())
    line = refused("plant", "tiny", "--fault", "moe_weights_twice", "--output", tmp_path / "t", module="oracle")
    assert "qwen2" in line and not (tmp_path / "t").exists()
    line = refused("plant", "tiny", "--fault", "yarn_missing", "--output", tmp_path / "t", module="oracle")
    assert "no difference" in line and not (tmp_path / "t").exists()
