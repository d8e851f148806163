"""The table, the model and the shapes say the same."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref import model
from jaxref.precision import numerics_of
from jaxref.stages import POSITIONS, STAGES, TOKENS, inputs_of, keys_of
from tests.conftest import ZOO, prompt
from tests.trees import distances, flat
from weights import Config, config_from_dict, open_checkpoint, random_params
from weights.config import RopeScaling
from weights.tiny import tiny_config


def run_table(params, tokens, config: Config, dtype: str) -> dict:
    """The forward pass by the table alone."""
    numerics, made = numerics_of(dtype), {}
    with numerics.context():
        params = jax.tree.map(lambda w: jnp.asarray(w).astype(numerics.compute), params)
        words = {TOKENS: jnp.asarray(tokens), POSITIONS: jnp.arange(len(tokens))}
        for layer, name in keys_of(config):
            stage = STAGES[name]
            inputs = [words[key] if isinstance(key, str) else made[key] for key in inputs_of(stage, config, layer)]
            owner = params if layer is None or name == "embedding" else params.layers[layer]
            if stage.per_expert:
                routed = made[layer, "moe_router_indices"]
                made[layer, name] = run_experts(stage, inputs[0], owner.experts, routed, config, layer, numerics)
            else:
                made[layer, name] = stage.run(inputs, owner, config, layer, numerics)
    return {name if layer is None else f"layer-{layer}/{name}": np.asarray(v) for (layer, name), v in made.items()}


def run_experts(stage, x, experts, routed, config: Config, layer: int, numerics):
    """A stage inside the experts, for each expert on all positions, keeping what was routed to it: [S, A, …]."""
    kept = None
    for number in range(config.num_experts):
        chosen = (routed == number)[..., None]
        rows = x if x.ndim == 2 else jnp.sum(jnp.where(chosen, x, 0), axis=1)
        value = stage.run([rows], jax.tree.map(lambda w, e=number: w[e], experts), config, layer, numerics)[:, None]
        kept = jnp.where(chosen, value, 0 if kept is None else kept)
    return kept


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2-yarn", "qwen2-window", "moe", "moe-sparse"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_running_the_table_gives_the_bytes_of_the_forward(zoo, name: str, dtype: str) -> None:
    checkpoint = open_checkpoint(zoo(name))
    if dtype == "float16" and checkpoint.config.qkv_bias:
        pytest.skip("a rounded qkv_matmul does not hold the sums that the forward adds the bias to")
    tokens = np.asarray(prompt(40, 272))
    trace = flat(jaxref.forward(checkpoint.params(), tokens, checkpoint.config, dtype))
    table = run_table(checkpoint.params(), tokens, checkpoint.config, dtype)
    assert table.keys() == trace.keys()
    for path, value in table.items():
        assert value.tobytes() == trace[path].tobytes(), path


@pytest.mark.parametrize("name", list(ZOO))
def test_eval_shape_agrees_with_the_table(name: str) -> None:
    arch, like, layers, changes = ZOO[name]
    config = config_from_dict(tiny_config(arch, like, layers, **changes))
    params = random_params(config) if like is None else jax.eval_shape(partial(random_shapes, config))
    shapes = jax.eval_shape(jaxref.forward, params, np.zeros(11, np.int32), config)
    found = {}
    for key, value in shapes.items():
        found |= (
            {(int(key[6:]), k): v.shape for k, v in value.items()}
            if isinstance(value, dict)
            else {(None, key): value.shape}
        )
    assert found == {key: STAGES[key[1]].shape(config, 11) for key in keys_of(config)}


def random_shapes(config: Config):
    """A parameter pytree of zeros, which `eval_shape` never makes."""
    from weights import Layer, Params
    from weights.names import layer_rows, model_rows

    layer = Layer(**{r.field: jnp.zeros(r.shape(config)) for r in layer_rows(config, 0)})
    whole = {r.field: jnp.zeros(r.shape(config)) for r in model_rows(config)}
    return Params(layers=(layer,) * config.num_hidden_layers, **whole)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "moe", "moe-sparse"])
def test_one_jit_of_the_whole_forward_agrees(zoo, name: str) -> None:
    checkpoint = open_checkpoint(zoo(name))
    tokens = np.asarray(prompt(40, 272))
    args = (checkpoint.params(), tokens, checkpoint.config)
    assert max(distances(jax.jit(jaxref.forward)(*args), jaxref.forward(*args)).values()) <= 5e-6


# Another value of each field that the table of tensors does not fix; every one must reach some stage.
CHANGES = {
    "rms_norm_eps": 1e-2,
    "rope_theta": 5000.0,
    "rope_scaling": RopeScaling("linear", 2.0),
    "layer_types": ("full_attention", "sliding_attention", "full_attention"),
    "sliding_window": 3,
}
ROUTING = {"num_experts_per_tok": 3, "norm_topk_prob": False}
YARN = RopeScaling("yarn", 4.0, 4096)
YARN_CHANGES = {
    "rope_type": "linear",
    "factor": 2.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 4.0,
    "beta_slow": 2.5,
    "attention_factor": 1.2,
    "truncate": False,
}
# These fix the shapes of tensors or which tensors there are: another value means other parameters.
STRUCTURE = {
    "num_experts",
    "moe_intermediate_size",
    "mlp_only_layers",
    "decoder_sparse_step",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
}


def windowed() -> Config:
    raw = tiny_config("qwen2", None, 3, use_sliding_window=True, sliding_window=5, max_window_layers=2)
    return config_from_dict(raw)


def differs(config: Config, changed: Config) -> bool:
    tokens, params = np.asarray(prompt(20, 272)), random_params(config)
    before, after = (flat(jaxref.forward(params, tokens, c)) for c in (config, changed))
    return any(before[k].shape != after[k].shape or not np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_the_config_changes_some_stage(field: str) -> None:
    config = windowed()
    assert differs(config, dataclasses.replace(config, **{field: CHANGES[field]}))


@pytest.mark.parametrize("field", ROUTING)
def test_every_field_of_the_routing_changes_some_stage(field: str) -> None:
    config = config_from_dict(tiny_config("qwen3_moe", None, 1))
    assert differs(config, dataclasses.replace(config, **{field: ROUTING[field]}))


@pytest.mark.parametrize("field", YARN_CHANGES)
def test_every_field_of_the_rope_scaling_changes_some_stage(field: str) -> None:
    config = dataclasses.replace(windowed(), rope_scaling=YARN)
    changed = dataclasses.replace(YARN, **{field: YARN_CHANGES[field]})
    assert differs(config, dataclasses.replace(config, rope_scaling=changed))


@pytest.mark.parametrize("field", sorted(STRUCTURE))
def test_every_structural_field_changes_the_trace(field: str) -> None:
    of_experts = field in ("num_experts", "moe_intermediate_size", "mlp_only_layers", "decoder_sparse_step")
    base = tiny_config("qwen3_moe" if of_experts else "qwen2")
    changed = base | {
        "model_type": {"model_type": "qwen3"},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "num_key_value_heads": {"num_key_value_heads": 3},
        "num_hidden_layers": {"num_hidden_layers": 3},
        "mlp_only_layers": {"mlp_only_layers": [0]},
    }.get(field, {field: base.get(field, 0) * 2 if field in base else None})
    traces = []
    for raw in (base, changed):
        config = config_from_dict(raw)
        traces.append(flat(jaxref.forward(random_params(config), np.asarray(prompt(5, 272)), config)))
    before, after = traces
    assert before.keys() != after.keys() or any(not np.array_equal(before[k], after[k]) for k in before)


def test_no_field_is_forgotten() -> None:
    assert {f.name for f in dataclasses.fields(Config)} == set(CHANGES) | set(ROUTING) | STRUCTURE
    assert {f.name for f in dataclasses.fields(RopeScaling)} == set(YARN_CHANGES)


def test_query_blocks_change_nothing_but_rounding(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(zoo("qwen3"))
    args = (checkpoint.params(), np.asarray(prompt(50, 272)), checkpoint.config)
    whole = jaxref.forward(*args)
    monkeypatch.setattr(model, "SCORES_IN_BLOCK", 6 * 50 * 7)
    assert model.query_rows(6, 50, 50) == 7
    assert max(distances(jaxref.forward(*args), whole).values()) <= 2e-6
