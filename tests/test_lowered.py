"""The programs that an NVIDIA GPU is given, read here without one: no TF32, no calls to the host, the stated dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref.experts import _accumulate
from jaxref.precision import numerics_of
from jaxref.stages import STAGES, Key, inputs_of, keys_of
from tests.conftest import ZOO
from weights import Config, config_from_dict, random_params
from weights.names import EXPERTS, layer_rows, model_rows
from weights.tiny import tiny_config

COUNT = 11
# Products a stage; all others have none.
DOTS = {"qkv_matmul": 3}
DOTS |= dict.fromkeys(("attn_scores", "attention", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head"), 1)
DOTS |= dict.fromkeys(("moe_router_logits", "moe_expert_gate", "moe_expert_up", "moe_expert_out"), 1)


def config_of(name: str) -> Config:
    arch, like, layers, changes = ZOO[name]
    return config_from_dict(tiny_config(arch, like, layers, **changes))


def cases() -> Iterator[tuple[str, Key]]:
    """Every stage that some model has, once; those of yarn and of a window too."""
    seen = set()
    for name in ("qwen2", "qwen3", "moe", "qwen2-yarn", "qwen2-window"):
        for layer, stage in keys_of(config_of(name)):
            if stage not in seen or (name.startswith("qwen2-") and stage in ("q_post_rope", "attn_softmax")):
                seen.add(stage)
                yield name, (layer, stage)


def anywhere(name: str, shape: tuple[int, ...]) -> None:
    """No word on where a parameter lies, or (with no name) an input."""


def abstract(stage, config: Config, layer: int | None, numerics, count: int = COUNT, where=anywhere, kept=None):
    """The stage's function with shapes in place of values, the parameters in the dtype `kept` or that of computing."""

    def shaped(shape, dtype=numerics.compute, name=""):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where(name, shape))

    inputs = []
    for key in inputs_of(stage, config, layer):
        if isinstance(key, str):
            inputs.append(shaped((count,), jnp.int32))
        else:
            integer = key[1] == "moe_router_indices"
            inputs.append(shaped(STAGES[key[1]].shape(config, count), jnp.int32 if integer else numerics.compute))
    if stage.per_expert:
        inputs = [shaped((count, inputs[0].shape[-1]))]
    rows = [*EXPERTS] if stage.per_expert else layer_rows(config, layer or 0) + model_rows(config)
    named = {row.field: (row.shape(config), row.name) for row in rows}
    named["head"] = (config.vocab_size, config.hidden_size), "lm_head.weight"
    params = [shaped(named[field][0], kept or numerics.compute, named[field][1]) for field in stage.params]
    return stage.function.trace(*inputs, *params, **stage.settings(config, layer or 0), numerics=numerics)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("name", "key"), list(cases()))
def test_what_a_gpu_is_given(name: str, key: Key, dtype: str) -> None:
    numerics, stage, config = numerics_of(dtype), STAGES[key[1]], config_of(name)
    with numerics.context():
        traced = abstract(stage, config, key[0], numerics)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (result,) = jax.tree.leaves(traced.out_info)
    assert result.dtype == (np.int32 if stage.name == "moe_router_indices" else numerics.compute)
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == DOTS.get(stage.name, 0)
    sums = {"float32": "f32", "float64": "f64"}[numerics.sums.name]
    for line in dots:
        assert re.search(r"precision = \[HIGHEST, HIGHEST\]", line), line
        assert re.search(rf"-> tensor<[0-9x]+x{sums}>", line), line
    assert_nothing_leaves_the_device(text)


def assert_nothing_leaves_the_device(text: str) -> None:
    """The only call out of the program is to XLA's own top-k."""
    assert set(re.findall(r"custom_call @([\w.]+)", text)) <= {"mhlo.topk"}
    assert not re.search(r"callback|infeed|outfeed|stablehlo\.(send|recv)\b", text)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moe"])
def test_the_whole_forward_for_a_gpu(name: str) -> None:
    config = config_of(name)
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_params(config)))
    tokens = jax.ShapeDtypeStruct((COUNT,), jnp.int32)
    text = jax.jit(jaxref.forward).trace(params, tokens, config).lower(lowering_platforms=("cuda",)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert dots and all("precision = [HIGHEST, HIGHEST]" in line for line in dots)
    assert_nothing_leaves_the_device(text)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_sum_over_experts_is_made_in_place(dtype: str) -> None:
    """The first argument is given up, and its memory becomes the result's."""
    numerics = numerics_of(dtype)

    def shaped(*shape, dtype=numerics.compute):
        return jax.ShapeDtypeStruct(shape, dtype)

    with numerics.context():
        args = shaped(COUNT, 72), shaped(COUNT, 72), shaped(COUNT), shaped(COUNT, dtype=jnp.int32)
        lowered = _accumulate.trace(*args, numerics=numerics).lower(lowering_platforms=("cuda",))
    assert re.search(r"%arg0: tensor<11x72x\w+> \{tf\.aliasing_output = 0", lowered.as_text())
    assert_nothing_leaves_the_device(lowered.as_text())
