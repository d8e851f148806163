"""float16 and bfloat16 round where Hugging Face rounds, and lead no further from the truth than it does."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

import jaxref
from jaxref.stages import STAGES
from tests.conftest import prompt
from tests.trees import distance, flat
from weights import open_checkpoint

hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
UP_TO_KEYS = list(STAGES)[: list(STAGES).index("k_post_rope") + 1]
ROUTED = ("moe_router", "moe_router_indices", "moe_expert", "moe_ffn_out")  # a tie in the router is another expert


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen2-0.5b", "moe-sparse"])
def traces(request: pytest.FixtureRequest, zoo, dtype: str) -> tuple[dict, dict, dict]:
    """jaxref and Hugging Face in this dtype, and the float64 truth."""
    folder = zoo(request.param)
    checkpoint = open_checkpoint(folder)
    tokens = prompt(40, checkpoint.config.vocab_size)
    args = (checkpoint.params(), np.asarray(tokens), checkpoint.config)
    theirs = flat(hf.capture(hf.load(folder, dtype), tokens))
    return flat(jaxref.forward(*args, dtype)), theirs, flat(jaxref.forward(*args, "float64"))


def test_jaxref_is_as_near_to_the_truth(traces) -> None:
    """The ratio of the two distances, in the median over layers, at every stage."""
    ours, theirs, truth = traces
    ratios: dict[str, list[float]] = {}
    for path, value in truth.items():
        stage = path.split("/")[-1]
        if far := distance(theirs[path], value):
            ratios.setdefault(stage, []).append(distance(ours[path], value) / far)
    medians = {stage: statistics.median(found) for stage, found in ratios.items() if not stage.startswith(ROUTED)}
    assert {stage: ratio for stage, ratio in medians.items() if ratio > 1.25} == {}


def test_the_first_layer_has_their_bits(traces, dtype: str) -> None:
    """What is left is the order of Hugging Face's float32 sums, which turns a rounding here and there."""
    ours, theirs, _ = traces
    same = {
        path.removeprefix("layer-0/"): float(np.mean(np.asarray(ours[path], np.float32) == value))
        for path, value in theirs.items()
        if path.startswith("layer-0/")
    }
    early = {stage: share for stage, share in same.items() if stage in UP_TO_KEYS}
    assert {stage: share for stage, share in early.items() if share < 0.99} == {}
    # One key value that Hugging Face's float32 sum rounds the other way is in the scores of 120 queries here.
    assert same["attn_scores"] >= 0.98
    # Each later stage inherits the turned roundings of all before it, in float16 eight times as many.
    late = {stage: share for stage, share in same.items() if stage not in UP_TO_KEYS}
    assert {stage: share for stage, share in late.items() if share < (0.9 if dtype == "bfloat16" else 0.5)} == {}
