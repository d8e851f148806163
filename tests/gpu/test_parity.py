"""A GPU against the CPU, stage by stage: each stage is given the CPU's own inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref import few_rows, ops
from jaxref.devices import find_devices
from jaxref.precision import numerics_of
from jaxref.session import Session
from jaxref.stages import POSITIONS, STAGES, TOKENS, inputs_of, keys_of
from tests.conftest import prompt
from tests.gpu.device import DEVICE
from tests.trees import distance, distances
from weights import open_checkpoint

pytestmark = pytest.mark.gpu
TOKENS_IN = prompt(40, 272)
# Relative L2 of one stage from the same inputs. In half precision a value that lies near the middle between two of its
# neighbours may be rounded the other way (one step: 2^-10, 2^-7), where exp or rsqrt differ in their last bit.
LOCAL = {"float32": 2e-6, "float64": 1e-13, "float16": 2**-11, "bfloat16": 2**-8}
CASES = [(name, "float32", 40) for name in ("qwen2", "qwen3", "moe", "qwen2-yarn", "qwen2-window")]
CASES += [(name, dtype, 40) for name in ("qwen2", "moe") for dtype in LOCAL if dtype != "float32"]
CASES += [("qwen2", dtype, 7) for dtype in LOCAL]  # products of few rows have a kernel of their own


@pytest.mark.parametrize(("name", "dtype", "count"), CASES)
def test_each_stage_gives_the_values_of_the_cpu(zoo, name: str, dtype: str, count: int) -> None:
    checkpoint, numerics = open_checkpoint(zoo(name)), numerics_of(dtype)
    config, device, cpu = checkpoint.config, find_devices(DEVICE)[0], jax.devices("cpu")[0]
    with numerics.context(), Session(checkpoint, dtype, "cpu") as session:
        made = session.forward(TOKENS_IN[:count])
        params = jax.tree.map(lambda w: jnp.asarray(w).astype(numerics.compute), checkpoint.params())
        for layer, stage in keys_of(config):
            row = STAGES[stage]
            if row.per_expert:
                continue  # the same function as ffn_gate, ffn_up and ffn_out
            inputs = [_input(made, key, count) for key in inputs_of(row, config, layer)]
            owner = params if layer is None or stage == "embedding" else params.layers[layer]
            both = []
            for place in (cpu, device):
                here = jax.device_put((inputs, [getattr(owner, field) for field in row.params]), place)
                settings = row.settings(config, layer or 0) | {"numerics": numerics.on(place)}
                with jax.default_device(place):
                    value = row.function(*here[0], *here[1], **settings)
                assert value.devices() == {place}
                both.append(np.asarray(value))
            if stage == "moe_router_indices":
                np.testing.assert_array_equal(*both)
            else:
                assert distance(both[1], both[0]) <= LOCAL[dtype], (layer, stage)


def _input(made, key, count: int):
    if isinstance(key, str):
        return np.asarray({TOKENS: TOKENS_IN[:count], POSITIONS: range(count)}[key], np.int32)
    layer, stage = key
    return np.asarray(made[stage] if layer is None else made[f"layer-{layer}"][stage])


@pytest.mark.parametrize("count", [7, 40])
@pytest.mark.parametrize(
    ("name", "dtype", "bound"), [("qwen2", "float32", 3e-5), ("qwen3", "float64", 1e-12), ("moe", "float32", 3e-5)]
)
def test_a_whole_forward(zoo, name: str, dtype: str, bound: float, count: int) -> None:
    tokens = TOKENS_IN[:count]
    with Session(zoo(name), dtype, "cpu") as cpu, Session(zoo(name), dtype, DEVICE) as device:
        apart = distances(device.forward(tokens), cpu.forward(tokens))
    assert max(apart.values()) <= bound, max(apart, key=apart.get)


def test_no_tf32(zoo) -> None:
    """Ten bits of mantissa would put a product of 3584 terms 3e-4 away; float32 is at 3e-7."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((64, 3584), (1024, 3584)))
    device, numerics = find_devices(DEVICE)[0], numerics_of("float32")
    product = ops.linear(*jax.device_put((x, weight), device), numerics=numerics)
    assert product.devices() == {device}
    assert distance(np.asarray(product), x.astype(np.float64) @ weight.astype(np.float64).T) <= 3e-6


@pytest.mark.parametrize("sums", ["float32", "float64"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 64, 600), (7, 896, 130), (8, 1000, 7), (7, 3584, 512)])
def test_few_rows(rows: int, width: int, outputs: int, stored: str, sums: str) -> None:
    """Nearer to the truth than one long sum, with the same bits each time; what lies beside is not touched."""
    rng, device = np.random.default_rng(0), find_devices(DEVICE)[0]
    x = rng.standard_normal((rows, width)).astype(sums)
    weight = rng.standard_normal((outputs, width), dtype=np.float32).astype(jnp.dtype(stored))
    with numerics_of(sums).context():
        operands = jax.device_put((x, weight), device)
        once, again = (few_rows.product(*operands, interpret=DEVICE == "cpu") for _ in range(2))
    truth = x.astype(np.float64) @ weight.astype(np.float64).T
    assert distance(np.asarray(once), truth) <= {"float32": 4e-7, "float64": 1e-15}[sums]
    assert np.asarray(once).tobytes() == np.asarray(again).tobytes()


@pytest.mark.parametrize("name", ["qwen2", "moe"])
def test_one_jit_of_the_whole_forward(zoo, name: str) -> None:
    checkpoint, device = open_checkpoint(zoo(name)), find_devices(DEVICE)[0]
    params = jax.device_put(checkpoint.params(), device)
    with jax.default_device(device), Session(checkpoint, device=DEVICE) as session:
        trace = jax.jit(jaxref.forward)(params, jnp.asarray(TOKENS_IN), checkpoint.config)
        assert trace["lm_head"].devices() == {device}
        assert max(distances(trace, session.forward(TOKENS_IN)).values()) <= 3e-5
