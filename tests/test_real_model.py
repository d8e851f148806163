"""The real Qwen2.5-Coder-0.5B-Instruct, where somebody brought it: `pytest --real-model DIR`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trees import distance, read_tree
from weights import open_tokenizer

pytestmark = pytest.mark.real_model
TOKENS = [3838, 374, 220, 17, 10, 17, 30]


def test_the_prompt_on_record_has_its_tokens(real_model: Path) -> None:
    tokenizer = open_tokenizer(real_model / "hf")
    assert tokenizer is not None
    assert tokenizer.encode("What is 2+2?") == TOKENS


def test_every_stage_agrees_with_hugging_face(real_model: Path, tmp_path: Path) -> None:
    hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
    words = [sys.executable, "-m", "jaxref", "dump", real_model / "hf", "--output", tmp_path / "tree", "--quiet"]
    subprocess.run(words, check=True)
    assert json.loads((tmp_path / "tree" / "manifest.json").read_text())["tokens"] == TOKENS
    ours, worst = read_tree(tmp_path / "tree"), {}

    def emit(layer: int | None, stage: str, value) -> None:
        path = f"{stage}.bin" if layer is None else f"layer-{layer}/{stage}.bin"
        theirs = (value[-1] if stage == "lm_head" else value).float().numpy()
        worst[path] = distance(ours[path], theirs)

    hf.run(hf.load(real_model / "hf"), TOKENS, emit)
    assert set(worst) == set(ours)
    assert {path: far for path, far in worst.items() if not far <= 3e-5} == {}
