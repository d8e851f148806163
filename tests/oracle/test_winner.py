"""A search that finds nothing ends: fewer layers, fewer pairs, and no memory that stays."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from oracle import winner
from oracle.bench import KEPT, Bench
from oracle.case import Case
from oracle.explain import Explained, explain
from oracle.localize import localize
from oracle.replay import Replay
from tests.conftest import prompt
from tests.oracle.standin import Planted, run, write
from tests.oracle.sweep import Models

TOKENS = prompt(23, 272)


@pytest.fixture
def told(tmp_path: Path):
    models = Models(tmp_path / "models")

    def explained(faults: dict) -> Explained:
        raw, weights, checkpoint = models.get("qwen2", Planted("", ()))
        write(tmp_path / "tree", run(raw, weights, TOKENS, "float32", faults))
        return explain(checkpoint, tmp_path / "tree", TOKENS)

    return explained


def test_what_nothing_explains_is_not_tried_in_every_layer(told, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    whole = winner._best
    monkeypatch.setattr(winner, "_best", lambda chain, row: tried.append(row.key) or whole(chain, row))
    monkeypatch.setattr(winner, "ENOUGH", 2)
    result = told({"noise/ffn_up": None})
    assert tried == [(0, "ffn_up"), (1, "ffn_up")]
    (cause,) = result.causes
    assert cause.layers == (0, 1, 2, 3) and cause.explanation is None and "noise-like" in cause.hint
    assert "ffn_up: hypotheses were tried in the first 2 faulty layers alone, and explained none" in result.found.notes


def test_what_is_named_once_is_tried_first(told, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    whole = winner._best
    monkeypatch.setattr(winner, "_best", lambda chain, row: tried.append(row.key) or whole(chain, row))
    result = told({"mask_strict": {0, 1}, "mask_chunks/8": {3}})
    assert tried == [(0, "attn_softmax"), (3, "attn_softmax")]
    named = {cause.layers: cause.explanation and cause.explanation.hypothesis for cause in result.causes}
    assert named == {(0, 1): "mask_strict", (3,): "mask_chunks"}


def test_a_bench_goes_with_its_last_user(tmp_path: Path) -> None:
    """The collector of cycles comes late, and a bench holds matrices in float64."""
    raw, weights, checkpoint = Models(tmp_path / "models").get("qwen2", Planted("", ()))
    write(tmp_path / "tree", run(raw, weights, TOKENS, "float32", {"noise/ffn_up": {1}}))
    seen = []

    def visit(replay: Replay, case: Case, row, engine: np.ndarray) -> None:
        bench = Bench(replay, case, engine)
        for layer in (0, 1, 2, 3, 0):
            first = bench.tensor("up_proj", layer)
            assert bench.tensor("up_proj", layer) is first and len(bench._tensors) <= KEPT
            np.testing.assert_array_equal(first, weights[f"model.layers.{layer}.mlp.up_proj.weight"])
        assert bench.tensor("gate_proj").shape == (112, 72) and len(bench._tensors) == KEPT
        seen.append(weakref.ref(bench))

    gc.disable()
    try:
        localize(checkpoint, tmp_path / "tree", TOKENS, visit=visit)
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()
