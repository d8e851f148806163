"""The stand-in engine: right where nothing is planted, and wrong exactly where the catalogue says."""

from __future__ import annotations

import json
import math
import struct
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxref
from jaxref.precision import numerics_of
from jaxref.stages import POSITIONS, STAGES, TOKENS, inputs_of, keys_of
from tests.conftest import YARN, prompt
from tests.oracle.standin import EXTRAS, FAULTS, Planted, run, struck_stages, write
from weights import Config, Params, config_from_dict
from weights.params import random_params, random_tensors
from weights.tiny import tiny_config

WORDS = prompt(11, 272)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "linear": ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "moe-sparse": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False, "mlp_only_layers": []}),
}
ALL = FAULTS | EXTRAS
CASES = [(name, arch) for name, planted in ALL.items() for arch in planted.archs]
VISIBLE = 1e-4  # a fault's least local error
CLEAN = 5e-6  # a right stage's most, with the right inputs
LOOSE = ("attn_softmax", "attention")  # 3e-5: one score of 10 is known to 1e-6 of itself, its exponential to 1e-5

FLOAT32 = numerics_of("float32")

Key = tuple[int | None, str]
Trace = dict[Key, np.ndarray]


@cache
def model(arch: str, changes: str = "{}", weights: str = "float32") -> tuple[dict[str, Any], Config, dict, Params]:
    """config.json, what jaxref makes of it, and the weights by name and as parameters; `changes` in JSON."""
    raw = tiny_config(arch, **json.loads(changes))
    config = config_from_dict(raw)

    def exact(values: np.ndarray) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32) if weights == "bfloat16" else values

    tensors = {name: exact(values) for name, values in random_tensors(config, 3).items()}
    return raw, config, tensors, jax.tree.map(exact, random_params(config, 3))


def model_for(planted: Planted, arch: str) -> tuple[dict[str, Any], Config, dict, Params]:
    return model(arch, json.dumps(planted.config), planted.weights)


@cache
def clean(arch: str, changes: str, weights: str) -> Trace:
    raw, _, tensors, _ = model(arch, changes, weights)
    return run(raw, tensors, WORDS)


def plant(name: str, arch: str) -> tuple[Trace, Trace]:
    """The run without and with a fault: in layer 0, or in the model where it is not a layer's."""
    raw, _, tensors, _ = model_for(ALL[name], arch)
    faults = {name: {0} if ALL[name].per_layer else None}
    return clean(arch, json.dumps(ALL[name].config), ALL[name].weights), run(raw, tensors, WORDS, faults=faults)


def distance(right: np.ndarray, wrong: np.ndarray) -> float:
    """Relative L2; infinite where one has a NaN that the other lacks, or another shape."""
    if right.shape != wrong.shape or not np.array_equal(np.isnan(right), np.isnan(wrong)):
        return math.inf
    right, wrong = (np.nan_to_num(x.astype(np.float64)) for x in (right, wrong))
    return float(np.linalg.norm(right - wrong) / max(np.linalg.norm(right), 1e-30))


def reference(config: Config, params: Params, dtype: str) -> Trace:
    tree = jaxref.forward(params, np.array(WORDS), config, dtype)
    return {
        (layer, stage): np.asarray(tree[stage] if layer is None else tree[f"layer-{layer}"][stage], np.float32)
        for layer, stage in keys_of(config)
    }


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_clean_engine_agrees_at_every_stage(name: str, dtype: str) -> None:
    arch, changes = VARIANTS[name]
    raw, config, tensors, params = model(arch, json.dumps(changes))
    expected, found = reference(config, params, dtype), run(raw, tensors, WORDS, dtype)
    assert set(found) == set(expected)
    # A sum that falls on the other side of a rounding moves all that follows by some units in the last place.
    bound = {"float32": CLEAN, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    for (layer, stage), values in expected.items():
        limit = 3e-5 if dtype == "float32" and stage in LOOSE else bound
        assert distance(values, found[layer, stage]) <= limit, (layer, stage)


def replay(key: Key, trace: Trace, config: Config, params: Params) -> np.ndarray:
    """A stage on the engine's own tensors."""
    layer, name = key
    stage = STAGES[name]
    known = {TOKENS: jnp.array(WORDS), POSITIONS: jnp.arange(len(WORDS))}
    inputs = [known[at] if isinstance(at, str) else jnp.array(trace[at]) for at in inputs_of(stage, config, layer)]
    owner = params if stage.scope in ("first", "model") else params.layers[layer or 0]
    if name == "moe_ffn_out":
        inputs[2] = inputs[2].astype(jnp.int32)
    if not stage.per_expert:
        return np.asarray(stage.run(inputs, owner, config, layer, FLOAT32))
    ids = trace[layer, "moe_router_indices"].astype(int)
    rows = np.broadcast_to(inputs[0] if inputs[0].ndim == 3 else inputs[0][:, None], (*ids.shape, inputs[0].shape[-1]))
    out = np.empty_like(trace[key])
    for expert in np.unique(ids):
        weights = jax.tree.map(lambda each, e=expert: each[e], owner.experts)
        out[ids == expert] = stage.run([jnp.array(rows[ids == expert])], weights, config, layer, FLOAT32)
    return out


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_a_fault_is_wrong_where_the_catalogue_says_and_nowhere_else(name: str, arch: str) -> None:
    _, config, _, params = model_for(ALL[name], arch)
    before, after = plant(name, arch)
    struck = struck_stages(ALL[name], after, 0)
    for key in keys_before(struck[0], after):
        assert np.array_equal(before[key], after[key]), key
    for key in after:
        if key[0] not in (0, None):
            continue
        error = distance(replay(key, after, config, params), after[key])
        if key in struck:
            assert error > VISIBLE and distance(before[key], after[key]) > VISIBLE, (key, error)
        else:
            assert error <= (3e-5 if key[1] in LOOSE else CLEAN), (key, error)


def keys_before(key: Key, trace: Trace) -> list[Key]:
    order = list(trace)
    return order[: order.index(key)]


def test_faults_keep_to_their_layers_and_can_be_several() -> None:
    raw, _, tensors, _ = model("qwen2")
    right = run(raw, tensors, WORDS)
    wrong = run(raw, tensors, WORDS, faults={"rope_reversed": {2}, "bias_missing/v": range(1, 2)})
    changed = [key for key in right if not np.array_equal(right[key], wrong[key])]
    assert changed[0] == (1, "qkv_bias")
    assert (2, "q_post_rope") in changed


@pytest.mark.parametrize("faults", [{"rope_revresed": None}, {"weight_neighbour/o_proj": {9}}, {"bias_missing": None}])
def test_a_fault_that_nothing_computes_is_refused(faults: dict[str, Any]) -> None:
    raw, _, tensors, _ = model("qwen3")
    with pytest.raises(ValueError, match="planted where nothing computes it"):
        run(raw, tensors, WORDS, faults=faults)


def test_every_fault_can_be_planted_in_half_precision() -> None:
    for name, planted in ALL.items():
        raw, _, tensors, _ = model_for(planted, planted.archs[0])
        for dtype in planted.dtypes[1:]:
            trace = run(raw, tensors, WORDS, dtype, {name: {0} if planted.per_layer else None})
            assert struck_stages(planted, trace, 0), name


def test_the_tiny_models_can_tell_the_scales_apart() -> None:
    raw = tiny_config("qwen2")
    assert raw["hidden_size"] // raw["num_attention_heads"] != raw["head_dim"]
    assert raw["num_attention_heads"] // raw["num_key_value_heads"] > 1


def test_the_files_are_an_engines(tmp_path) -> None:
    raw, _, tensors, _ = model("qwen3_moe")
    trace = run(raw, tensors, WORDS)
    write(tmp_path, trace, last=True)
    data = (tmp_path / "lm_head.bin").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"APRT", 0xFFFFFFFF, 272)
    assert np.array_equal(np.frombuffer(data[12:], "<f4"), trace[None, "lm_head"][-1])
    data = (tmp_path / "layer-2" / "attention.bin").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"APRT", 2, 11 * 96)
    assert not (tmp_path / "manifest.json").exists()
