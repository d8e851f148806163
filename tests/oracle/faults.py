"""Runs of the tiny models, clean and with planted faults, written as trees; nothing here computes a distance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import jaxref
from jaxref import attention, ops
from jaxref.aprt import HEADER, aprt_header
from jaxref.stages import STAGES
from weights import Config, Params, config_from_dict
from weights.params import random_params
from weights.tiny import tiny_config

Trace = dict[str, Any]


def model(arch: str, seed: int = 0, **changes: Any) -> tuple[Params, Config]:
    """A tiny random model."""
    config = config_from_dict(tiny_config(arch, **changes))
    return random_params(config, seed), config


def run(params: Params, config: Config, tokens: list[int], dtype: str) -> Trace:
    """A forward as float32 (float64) NumPy arrays."""
    trace = jaxref.forward(params, np.asarray(tokens), config, dtype)
    return map_trace(trace, lambda stage, x: np.asarray(x).astype(np.float64 if dtype == "float64" else np.float32))


def map_trace(trace: Trace, function: Callable[[str, Any], Any]) -> Trace:
    """Apply a function of (stage, array) to every array."""
    return {
        key: {stage: function(stage, x) for stage, x in value.items()}
        if isinstance(value, dict)
        else function(key, value)
        for key, value in trace.items()
    }


def write(folder: Path, trace: Trace, *, rows: list[int] | None = None, last: bool = True, **manifest: Any) -> Path:
    """Write a trace as APRT files as an engine does; a manifest only where something is said for it."""
    for key, value in trace.items():
        stages = value if isinstance(value, dict) else {key: value}
        layer = int(key.split("-")[1]) if isinstance(value, dict) else None
        for stage, array in stages.items():
            path = folder / (f"layer-{layer}" if layer is not None else "") / f"{stage}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            axis = STAGES[stage].row_axis
            wanted = rows if rows is not None else [array.shape[axis] - 1] if last and STAGES[stage].last else None
            array = array if wanted is None else np.take(array, wanted, axis=axis)
            path.write_bytes(aprt_header(layer, array.shape) + np.ascontiguousarray(array, "<f4").tobytes())
    if manifest:
        note = {"schema": "jaxref-tree-v1", "positions": rows, "files": []} | manifest
        (folder / "manifest.json").write_text(json.dumps(note))
    return folder


def write_reference(folder: Path, trace: Trace, config: Config, tokens: list[int], dtype: str, **more: Any) -> Path:
    """A tree with a manifest."""
    return write(folder, trace, config=config.to_json(), tokens=tokens, dtype=dtype, **more)


def overwrite(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the values of an APRT file in place."""
    data = path.read_bytes()
    values = np.frombuffer(data[HEADER.size :], "<f4").copy()
    change(values)
    path.write_bytes(data[: HEADER.size] + values.tobytes())


@dataclass(frozen=True)
class Fault:
    """`plant` is a context in which `run` of the changed (params, config) shows the fault first at `first`."""

    first: tuple[int, str]
    last_good: str | None
    change: Callable[[Params, Config], tuple[Params, Config]] = lambda params, config: (params, config)
    plant: Callable[[], Any] = lambda: mock.patch.dict({})


def with_layer(params: Params, index: int, **fields: Any) -> Params:
    layers = list(params.layers)
    layers[index] = layers[index].replace(**fields)
    return params.replace(layers=tuple(layers))


def _kv_heads_swapped() -> Any:
    """Query heads of the first group read the second kv head, and the other way round."""
    original = attention.attn_scores

    def faulty(q: Any, k: Any, *, head_dim: int, **settings: Any) -> Any:
        swapped = k.reshape(k.shape[0], -1, head_dim)[:, ::-1].reshape(k.shape)
        return original(q, swapped, head_dim=head_dim, **settings)

    return mock.patch.object(attention, "attn_scores", faulty)


@contextmanager
def _nan_at_one_position() -> Iterator[None]:
    """Layer 1 (its silu is the second call) makes a NaN of unit 5 at token 3."""
    original, calls = ops.silu, []

    def faulty(x: Any, *, numerics: Any) -> Any:
        calls.append(1)
        y = original(x, numerics=numerics)
        return y.at[3, 5].set(np.nan) if len(calls) == 2 else y

    with mock.patch.object(ops, "silu", faulty):
        yield


FAULTS: dict[str, Fault] = {
    "rope theta": Fault(
        (0, "q_post_rope"), "qkv_bias", lambda params, config: (params, replace(config, rope_theta=1e6))
    ),
    "swapped kv heads": Fault((0, "attn_scores"), "k_post_rope", plant=_kv_heads_swapped),
    "missing bias": Fault(
        (1, "qkv_bias"),
        "qkv_matmul",
        lambda params, config: (with_layer(params, 1, k_bias=0 * params.layers[1].k_bias), config),
    ),
    "wrong eps": Fault(
        (0, "attn_norm"), "embedding", lambda params, config: (params, replace(config, rms_norm_eps=1e-3))
    ),
    "scaled embedding": Fault(
        (0, "embedding"), None, lambda params, config: (params.replace(embed_tokens=1.05 * params.embed_tokens), config)
    ),
    "NaN at one position": Fault((1, "ffn_silu"), "ffn_up", plant=_nan_at_one_position),
}
