"""float16 and bfloat16 round where Hugging Face rounds, and lead no further from the truth than it does."""

from __future__ import annotations

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref.precision import Numerics, numerics_of
from jaxref.stages import POSITIONS, STAGES, inputs_of, stages_of
from tests.conftest import prompt
from tests.trees import distance, flat
from weights import Checkpoint, open_checkpoint

hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
UP_TO_KEYS = list(STAGES)[: list(STAGES).index("k_post_rope") + 1]
# The bias is added before the product is rounded, and experts that are nearly tied may change places.
INDICES = "moe_router_indices"
NOT_ALONE = ("qkv_bias", INDICES)
COUNT = 40
ROUTED = ("moe_router", "moe_router_indices", "moe_expert", "moe_ffn_out")  # a tie in the router is another expert


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen2-0.5b", "moe-sparse"])
def traces(request: pytest.FixtureRequest, zoo, dtype: str) -> tuple[dict, dict, dict, Checkpoint]:
    """jaxref and Hugging Face in this dtype, the float64 truth, and the checkpoint."""
    folder = zoo(request.param)
    checkpoint = open_checkpoint(folder)
    tokens = prompt(COUNT, checkpoint.config.vocab_size)
    args = (checkpoint.params(), np.asarray(tokens), checkpoint.config)
    theirs = flat(hf.capture(hf.load(folder, dtype), tokens))
    return flat(jaxref.forward(*args, dtype)), theirs, flat(jaxref.forward(*args, "float64")), checkpoint


def test_jaxref_is_as_near_to_the_truth(traces) -> None:
    """The ratio of the two distances, in the median over layers, at every stage."""
    ours, theirs, truth, _ = traces
    ratios: dict[str, list[float]] = {}
    for path, value in truth.items():
        stage = path.split("/")[-1]
        if far := distance(theirs[path], value):
            ratios.setdefault(stage, []).append(distance(ours[path], value) / far)
    medians = {stage: statistics.median(found) for stage, found in ratios.items() if not stage.startswith(ROUTED)}
    assert {stage: ratio for stage, ratio in medians.items() if ratio > 1.25} == {}


def test_the_first_stages_have_their_bits(traces) -> None:
    """What is left is the order of Hugging Face's float32 sums, which turns a rounding here and there."""
    ours, theirs, _, _ = traces
    early = {stage: same(ours[path], theirs[path]) for stage in UP_TO_KEYS if (path := f"layer-0/{stage}") in theirs}
    assert len(early) >= 5 and {stage: share for stage, share in early.items() if share < 0.99} == {}


def test_each_stage_has_their_bits_on_their_inputs(traces, dtype: str) -> None:
    """So that none inherits the turned roundings of those before it, more on one processor than on another."""
    _, theirs, _, checkpoint = traces
    config, numerics, shares = checkpoint.config, numerics_of(dtype), {}
    with numerics.context():
        params = jax.tree.map(lambda w: jnp.asarray(w, numerics.compute), checkpoint.params())
        for layer, stage in ((at, stage) for at in (0, 1) for stage in stages_of(config, at)):
            if stage.name in NOT_ALONE or stage.per_expert or stage.scope == "first":
                continue
            inputs = [theirs_at(theirs, source, numerics) for source in inputs_of(stage, config, layer)]
            found = stage.run(inputs, params.layers[layer], config, layer, numerics)
            shares[layer, stage.name] = same(found, theirs[f"layer-{layer}/{stage.name}"])
    assert len(shares) >= 24 and {key: share for key, share in shares.items() if share < 0.99} == {}


def theirs_at(theirs: dict, source: Any, numerics: Numerics) -> jax.Array:
    """What a stage reads, of Hugging Face's."""
    if isinstance(source, str):
        assert source == POSITIONS
        return jnp.arange(COUNT)
    layer, name = source
    return jnp.asarray(theirs[f"layer-{layer}/{name}"]).astype(int if name == INDICES else numerics.compute)


def same(ours: Any, theirs: Any) -> float:
    """The share of values that are the same."""
    return float(np.mean(np.asarray(ours, np.float32) == np.asarray(theirs, np.float32)))
