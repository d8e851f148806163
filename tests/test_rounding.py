"""Rounding points in half precision, on whatever machine: those right before a sum must not be left to a compiler.

On a processor with float16 arithmetic a product that is converted to it, then added, became one fused multiply-add,
which rounds once; a machine without it shows nothing of that, so the program is read instead.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref import attention
from jaxref.experts import _accumulate
from jaxref.feedforward import moe_ffn_out
from jaxref.precision import Numerics, numerics_of
from tests.commands import ROOT
from tests.trees import tree_bytes
from weights import config_from_dict, random_params
from weights.tiny import tiny_config

HALF = ("float16", "bfloat16")
WIDENED, PRODUCT, NARROWED, SUM = "widened", "a product of those", "that in fewer bits", "a sum with that in it"
# What these give is what they were given, as far as rounding goes.
KEEPING = {
    "reshape",
    "slice",
    "squeeze",
    "broadcast_in_dim",
    "transpose",
    "concatenate",
    "gather",
    "optimization_barrier",
}
KEEPING |= {"optimization_barrier", "neg", "select_n"}


def fusible(closed: Any, states: list[str | None] | None = None) -> tuple[int, list[str | None]]:
    """How many sums of a jaxpr could be half precision's own, with a product in them that is; and what its outputs are.

    Each was narrowed by a conversion, so that a compiler may take the operation itself for half precision's.
    """
    jaxpr, found = closed.jaxpr, 0
    known: dict[Any, str | None] = dict(zip(jaxpr.invars, states or [None] * len(jaxpr.invars), strict=True))
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        given = [known.get(v) if isinstance(v, jax.extend.core.Var) else WIDENED for v in equation.invars]
        made: list[str | None] = [None] * len(equation.outvars)
        inner = [v for v in equation.params.values() if isinstance(v, jax.extend.core.ClosedJaxpr)]
        for each in inner:
            alike = len(inner) == 1 and len(each.jaxpr.invars) == len(given)
            count, results = fusible(each, given if alike else None)
            found, made = found + count, results if alike else made
        state = next(filter(None, given), None)
        if name == "mul" and set(given) == {WIDENED}:
            made = [PRODUCT]
        elif name in ("add", "sub") and NARROWED in given:
            made = [SUM]
        elif name == "convert_element_type" and str(equation.params["new_dtype"]) in HALF:
            found += state == SUM
            made = [NARROWED if state == PRODUCT else None]
        elif name == "convert_element_type" and str(equation.invars[0].aval.dtype) in HALF:
            made = [state or WIDENED]
        elif name in KEEPING:
            made = [state]
        known |= dict(zip(equation.outvars, made, strict=True))
    return found, [known.get(v) if isinstance(v, jax.extend.core.Var) else None for v in jaxpr.outvars]


@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", HALF)
def test_no_sum_takes_a_product_that_a_conversion_rounded(arch: str, dtype: str) -> None:
    config = config_from_dict(tiny_config(arch, None, 2))
    args = (random_params(config), np.arange(5), config)
    with numerics_of(dtype).context():
        whole = jax.make_jaxpr(partial(jaxref.forward, dtype=dtype), static_argnums=2)(*args)
    assert fusible(whole)[0] == 0


@pytest.mark.parametrize("dtype", HALF)
def test_the_test_sees_them(monkeypatch, dtype: str) -> None:
    """RoPE and both sums over experts, were they rounded as everything else is."""
    monkeypatch.setattr(Numerics, "rounded", lambda self, x: self.widen(self.round(x)))
    jax.clear_caches()
    numerics = numerics_of(dtype)
    rows, ids, shares = jnp.ones((3, 2, 4), dtype), jnp.zeros((3, 2), int), jnp.ones((3, 2), dtype)
    rope = {"start": 0, "heads": 2, "head_dim": 4, "theta": 1e4, "scaling": None, "numerics": numerics}
    calls = [
        (partial(attention.rope, **rope), (jnp.ones((3, 8), dtype), jnp.arange(3)), 1),
        (partial(moe_ffn_out, numerics=numerics), (rows, shares, ids), 1),
        (partial(_accumulate, numerics=numerics), (rows[:, 0], rows[:, 0], shares[:, 0], ids[:, 0]), 1),
    ]
    found = [fusible(jax.make_jaxpr(function)(*operands))[0] for function, operands, _ in calls]
    jax.clear_caches()
    assert found == [count for *_, count in calls]


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_by_bits_is_the_conversion(dtype: str) -> None:
    rng = np.random.default_rng(0)
    any_bits = np.frombuffer(rng.bytes(4 << 18), np.float32)
    near = (rng.standard_normal(1 << 18) * 2.0 ** rng.integers(-27, 17, 1 << 18)).astype(np.float32)
    edges = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2**-14, 2**-24, 2**-25, 1.5 * 2**-25]
    edges += [2**-14 - 2**-25, 2**-14 - 2**-26, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]
    values = np.concatenate([any_bits, near, np.float32(edges), -np.float32(edges)])
    with np.errstate(all="ignore"):
        expected = values.astype(jnp.dtype(dtype)).astype(np.float32)
    found = np.asarray(jax.jit(numerics_of(dtype).rounded)(values))
    nan = np.isnan(expected)
    assert np.array_equal(nan, np.isnan(found))
    assert np.array_equal(expected[~nan].view(np.uint32), found[~nan].view(np.uint32))


@pytest.mark.parametrize("dtype", HALF)
def test_sums_in_float64_are_rounded_once(dtype: str) -> None:
    """Beside the middle of two numbers by less than float32 can tell."""
    numerics, info = numerics_of(dtype), jnp.finfo(dtype)
    unit, steps = float(info.eps), np.arange(64)
    for scale in (1.0, 2.0**-10, 2.0**10):
        below, above = scale * (1 + steps * unit), scale * (1 + (steps + 1) * unit)
        middle = (below + above) / 2
        with numerics.context():
            near = (np.asarray(jax.jit(numerics.round)(middle * (1 + sign * 2.0**-40))) for sign in (-1, 1))
            for found, expected in zip(near, (below, above), strict=True):
                assert np.array_equal(found.astype(np.float64), expected)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="XLA's names are those of x86 processors")
@pytest.mark.parametrize("dtype", HALF)
def test_processors_give_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    """With the instructions of this one, and with those of ten years ago."""
    words = [sys.executable, "-m", "jaxref", "dump", "tiny", "--dtype", dtype, "--quiet", "--output"]
    for name, flags in (("own", ""), ("old", "--xla_cpu_max_isa=AVX2")):
        environment = os.environ | {"XLA_FLAGS": flags}
        subprocess.run([*words, tmp_path / name], env=environment, cwd=ROOT, check=True)
    own, old = tree_bytes(tmp_path / "own"), tree_bytes(tmp_path / "old")
    assert len(own) > 60 and own == old
