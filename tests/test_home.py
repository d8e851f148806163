"""Bringing a trace to the host changes nothing in it, whether its stages come one by one or a layer at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxref
from jaxref import home
from jaxref.session import Session
from tests.conftest import prompt
from tests.trees import flat

TOKENS = prompt(9, 272)


def assert_same(found, trace) -> None:
    """Names and their order, dtypes, shapes and bits."""
    assert list(found) == list(trace)
    assert [list(part) for part in found.values() if isinstance(part, dict)] == [
        list(part) for part in trace.values() if isinstance(part, dict)
    ]
    expected, arrays = flat(trace), flat(found)
    for key, value in expected.items():
        assert isinstance(arrays[key], np.ndarray)
        assert (arrays[key].dtype, arrays[key].shape) == (value.dtype, value.shape), key
        assert arrays[key].tobytes() == np.asarray(value).tobytes(), key


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "as from a GPU"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "moe"])
def test_a_trace_keeps_its_names_and_bits(zoo, monkeypatch, name: str, dtype: str, together: bool) -> None:
    with Session(zoo(name), dtype) as session:
        trace = session.forward(TOKENS)
    joined, limit = [], trace["layer-1"]["attn_norm"].nbytes
    if together:
        join = home._joined
        monkeypatch.setattr(home, "_is_small_elsewhere", lambda value: value.nbytes <= limit)
        monkeypatch.setattr(home, "_joined", lambda values: joined.append(len(values)) or join(values))
    assert_same(jaxref.to_numpy(trace), trace)
    if together:
        whole = len(trace["layer-1"])
        assert len(joined) >= len(trace) - 2 and all(1 <= count < whole for count in joined)  # both ways are taken


def test_what_has_no_number_and_no_element_arrives() -> None:
    trace = {"layer-0": {"a": jnp.array([jnp.nan, -0.0, jnp.inf]), "b": jnp.zeros((0, 3))}, "c": np.arange(3)}
    assert_same(jaxref.to_numpy(trace), trace)


def test_on_a_cpu_nothing_is_copied() -> None:
    value = jax.block_until_ready(jnp.arange(1000.0))
    assert np.shares_memory(jaxref.to_numpy({"lm_head": value})["lm_head"], np.asarray(value))
