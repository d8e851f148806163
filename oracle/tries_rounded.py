"""Hypotheses about numbers that are kept in fewer bits than the engine computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from oracle.bench import Bench, Get
from oracle.tries import Try

FLOAT8: dict[str, Any] = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
HALF: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _coarser(bench: Bench) -> dict[str, Any]:
    """The types with fewer bits than the engine's own that are worth a name: none but of float32."""
    return HALF if bench.replay.emulated.compute.itemsize >= 4 else {}


def stored(bench: Bench) -> Iterator[Try]:
    """The stage's own result rounded."""
    for name, dtype in _coarser(bench).items():
        if (bench.stage, name) != ("moe_router_logits", "float16"):  # that is router_half
            shown = {} if bench.row.per_expert else {"shown": bench.engine}
            yield Try(name, {"stored": dtype, **shown}, f"its result is rounded to {name}")


def weights(bench: Bench) -> Iterator[Try]:
    """All its weights rounded."""
    for name, dtype in _coarser(bench).items():
        picks = {field: partial(_narrowed, dtype) for field in bench.row.params}
        yield Try(name, {"w": picks}, f"its weights are rounded to {name}, the checkpoint's have more bits")


def inputs(bench: Bench) -> Iterator[Try]:
    """What a product reads, rounded before it, alone or with its weights."""
    x = bench.x[0]
    for name, dtype in _coarser(bench).items():
        rows = {0: _rounded(dtype, x)}
        yield Try(name, {"x": rows}, f"its input is rounded to {name} before the product")
        picks = {field: partial(_narrowed, dtype) for field in bench.row.params}
        yield Try(f"{name} both", {"x": rows, "w": picks}, f"its input and its weights are rounded to {name}")
    yield Try("int8", {"x": {0: int8(x)}}, "its input is rounded to int8, a scale for each row")


def _narrowed(dtype: Any, get: Get) -> np.ndarray:
    return get().astype(dtype).astype(np.float64)


def int8(x: np.ndarray) -> np.ndarray:
    """Rows [..., h] in 255 steps of their greatest value."""
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / np.where(step == 0, 1, step)) * step


def int8_result(bench: Bench) -> Iterator[Try]:
    """k as an int8 cache keeps it."""
    if _coarser(bench):
        yield Try("int8", {"after": int8}, "its result is rounded to int8, a scale for each head and token")


def cached(bench: Bench) -> Iterator[Try]:
    """k or v read from a cache with fewer bits."""
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {"int8": int8}
    kinds |= {name: partial(_rounded, dtype) for name, dtype in FLOAT8.items()}
    for name, dtype in _coarser(bench).items():
        kinds[name] = partial(_rounded, dtype)
    K, h, start = bench.config.num_key_value_heads, bench.config.head_dim, bench.settings.get("start", 0)
    rows = bench.x[1][:, start : start + K * h]
    for name, kind in kinds.items():
        kept = kind(rows.reshape(-1, K, h)).reshape(rows.shape)
        part = "v" if bench.stage == "attention" else "k"
        switches: dict[str, Any] = {"x": {1: kept}} | ({"start": 0} if start else {})
        yield Try(name, switches, f"{part} is read from a cache in {name}")


def _rounded(dtype: Any, x: np.ndarray) -> np.ndarray:
    return x.astype(dtype).astype(np.float64)
