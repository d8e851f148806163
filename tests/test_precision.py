"""No dot of the lowered program may be left to a device's default, which on NVIDIA cards is TF32."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.extend
import numpy as np
import pytest

import jaxref
from weights import config_from_dict, random_params
from weights.tiny import tiny_config


def dots_of(jaxpr, found: list) -> list:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params)
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                dots_of(value.jaxpr, found)
    return found


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dot_is_at_the_highest_precision(arch: str, dtype: str) -> None:
    config = config_from_dict(tiny_config(arch, None, 2))
    args = (random_params(config), np.arange(5), config)
    dots = dots_of(jax.make_jaxpr(partial(jaxref.forward, dtype=dtype))(*args).jaxpr, [])
    # 3 projections of QKV, scores, attention, output, gate, up, down; one router; and the head.
    assert len(dots) == 9 * config.num_hidden_layers + (arch == "qwen3_moe") + 1
    assert {str(params["precision"]) for params in dots} == {"(Precision.HIGHEST, Precision.HIGHEST)"}
    sums = "float32" if dtype == "float32" else "float64"
    assert {str(params["preferred_element_type"]) for params in dots} == {sums}


def test_the_lowered_program_says_so_and_calls_no_host() -> None:
    config = config_from_dict(tiny_config("qwen2", None, 2))
    text = jax.jit(jaxref.forward).lower(random_params(config), np.arange(5), config).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert all(re.search(r"precision\s*=\s*\[HIGHEST,\s*HIGHEST\]", line) for line in dots)
    assert "callback" not in text
