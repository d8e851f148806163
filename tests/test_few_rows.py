"""Products of few rows for a GPU: the kernel run on the CPU, and who is given it."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

import jaxref
from jaxref import few_rows, ops
from jaxref.activations import Weight
from jaxref.precision import Numerics, numerics_of
from tests.gpu.cards import mesh_of
from tests.trees import distance
from weights import config_from_dict, random_params
from weights.tiny import tiny_config

CARD = mesh_of("NVIDIA H100 80GB HBM3")


def operands(rows: int, width: int, outputs: int, stored: str = "float32", sums: str = "float32"):
    rng = np.random.default_rng(rows + width)
    weight = rng.standard_normal((outputs, width), dtype=np.float32).astype(jnp.dtype(stored))
    return rng.standard_normal((rows, width)).astype(sums), weight


@pytest.mark.parametrize("sums", ["float32", "float64"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "width", "outputs"),
    [(7, 896, 130), (8, 1000, 1030), (1, 64, 7), (3, 1, 1), (2, 4864, 2)],
    ids=lambda n: str(n),
)
def test_the_kernel_gives_the_product(rows: int, width: int, outputs: int, stored: str, sums: str) -> None:
    """Widths that no step divides, outputs that no block divides, one of each."""
    x, weight = operands(rows, width, outputs, stored, sums)
    with numerics_of(sums).context():
        product = few_rows.product(x, weight, interpret=True)
    assert product.dtype == sums and product.shape == (rows, outputs)
    truth = x.astype(np.float64) @ weight.astype(np.float64).T
    assert distance(np.asarray(product), truth) <= {"float32": 3e-7, "float64": 2e-15}[sums]


def test_what_is_not_finite_stays_in_its_row_and_its_output() -> None:
    """What lies beside the operands is masked, not multiplied by zero."""
    x, weight = operands(4, 130, 6)
    x[1, 129], weight[2, 0] = np.inf, np.nan
    product = np.asarray(few_rows.product(x, weight, interpret=True))
    assert np.isnan(product[:, 2]).all() and not np.isfinite(product[1]).any()
    assert np.isfinite(np.delete(np.delete(product, 2, 1), 1, 0)).all()


def calls(x, weight, *, gpu: bool, platform: str) -> tuple[int, int]:
    """How many kernels and how many products of XLA's own a program for a platform holds."""
    numerics = replace(numerics_of("float32"), gpu=gpu)
    with use_abstract_mesh(CARD):
        lowered = ops.linear.trace(x, weight, numerics=numerics).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    return text.count("@__gpu$xla.gpu.triton"), len(re.findall(r"stablehlo\.dot_general", text))


@pytest.mark.parametrize(
    ("rows", "gpu", "platform", "found"),
    [
        (8, True, "cuda", (1, 0)),
        (9, True, "cuda", (0, 1)),
        (8, False, "cuda", (0, 1)),  # a mesh, whose products are split
        (8, True, "cpu", (0, 1)),
    ],
)
def test_who_is_given_the_kernel(rows: int, gpu: bool, platform: str, found: tuple[int, int]) -> None:
    assert calls(*operands(rows, 64, 48), gpu=gpu, platform=platform) == found


@pytest.mark.parametrize(
    ("platform", "capability", "mesh", "kernel"),
    [
        ("gpu", "9.0", None, True),
        ("gpu", "12.0", SimpleNamespace(size=1), True),
        ("gpu", "9.0", SimpleNamespace(size=4), False),
        ("gpu", "7.5", None, False),  # Triton would refuse it with a traceback
        ("gpu", "gfx90a", None, False),
        ("cpu", "9.0", None, False),
    ],
)
def test_which_cards_have_it(platform: str, capability: str, mesh, kernel: bool) -> None:
    card = SimpleNamespace(platform=platform, compute_capability=capability)
    assert numerics_of("float32").on(card, mesh).gpu is kernel


def test_parameters_that_several_devices_share_are_left_to_the_partitioner(monkeypatch) -> None:
    config = config_from_dict(tiny_config("qwen2"))
    params, tokens = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_params(config))), np.arange(7)
    monkeypatch.setattr(Numerics, "on", lambda self, device, mesh=None: replace(self, gpu=True))
    for count, kernels in ((1, True), (4, False)):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        with use_abstract_mesh(CARD):
            forward = jax.jit(partial(jaxref.forward), static_argnums=2)  # another `partial`, another cache
            text = forward.trace(params, tokens, config).lower(lowering_platforms=("cuda",)).as_text()
        assert ("triton" in text) is kernels


def test_what_an_engine_rounds_is_rounded_before_the_kernel() -> None:
    x, weight = operands(7, 64, 48)
    for gpu in (False, True):
        numerics = replace(numerics_of("float32"), gpu=gpu)
        product = ops.linear(x, Weight(jnp.asarray(weight), "float16"), numerics=numerics)
        truth = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64).T
        assert distance(np.asarray(product), truth) <= 1e-6


def test_what_the_kernel_cannot_count_through_is_left_to_xla() -> None:
    told = []
    for outputs in (1 << 14, 1 << 15):
        shapes = [jax.ShapeDtypeStruct((rows, 1 << 16), np.float32) for rows in (8, outputs)]
        jax.eval_shape(lambda x, weight: told.append(few_rows.fits(x, weight)), *shapes)
    assert told == [True, False]
