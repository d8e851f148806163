"""Positions that half precision does not have show in prompts longer than the sweep's."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle.explain import explain
from tests.conftest import prompt
from tests.oracle.standin import Planted, run, write
from tests.oracle.sweep import Models

ROPE = {"q_post_rope", "k_post_rope"}


@pytest.mark.parametrize("count", [23, 257, 300])
def test_positions_in_bfloat16_show_above_256(tmp_path: Path, count: int) -> None:
    raw, weights, checkpoint = Models(tmp_path / "models").get("qwen2", Planted("", ()))
    tokens = prompt(count, 272)
    trace = run(raw, weights, tokens, "float32", {"rope_half_positions/bfloat16": {1}})
    write(tmp_path / "tree", trace)
    causes = explain(checkpoint, tmp_path / "tree", tokens).causes
    named = {c.stage: c.explanation and (c.explanation.hypothesis, c.explanation.parameter) for c in causes}
    assert named == (dict.fromkeys(ROPE, ("rope_half_positions", "bfloat16")) if count > 257 else {})
