"""Hypotheses about numbers that are kept in fewer bits than the engine computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from oracle.bench import Bench, Get
from oracle.quantised import FLOAT8, KINDS, Kind, Round, cast, int8
from oracle.tries import Try

# An error as many times as large or as small as what a kind makes of normal numbers may still be that kind's.
NEAR = 6.0
# So many columns of a matrix tell whether it is worth rounding as a whole, by leaving so much less than they did.
COLUMNS, TELLS = 64, 0.5
NORMED = ("attn_norm", "ffn_norm", "final_norm", "q_norm", "k_norm")
HALF: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def coarser(bench: Bench) -> dict[str, Any]:
    """The types with fewer bits than the engine's own that are worth a name: none but of float32."""
    return HALF if bench.replay.emulated.compute.itemsize >= 4 else {}


def stored(bench: Bench) -> Iterator[Try]:
    """The stage's own result rounded."""
    for name, dtype in coarser(bench).items():
        if (bench.stage, name) != ("moe_router_logits", "float16"):  # that is router_half
            shown = {} if bench.row.per_expert else {"shown": bench.engine}
            yield Try(name, {"stored": dtype, **shown}, f"its result is rounded to {name}")


def weights(bench: Bench) -> Iterator[Try]:
    """All its weights rounded."""
    for name, dtype in ({} if bench.stage == "embedding" else coarser(bench)).items():
        picks = {field: partial(_narrowed, dtype) for field in bench.row.params}
        yield Try(name, {"w": picks}, f"its weights are rounded to {name}, the checkpoint's have more bits")
    if bench.stage == "embedding":
        exact = bench.run({})
        for name, kind in _likely(bench, exact.shape[-1]):
            if "one scale" not in kind.words:  # which would take the whole table
                yield Try(name, {"rows": kind.matrix(exact)}, f"its rows are rounded to {kind.words}")
    elif bench.stage not in NORMED:
        yield from _quantised(bench)


def _quantised(bench: Bench) -> Iterator[Try]:
    """Weights in eight bits or fewer, alone and with the input: those that some of the columns speak for."""
    for name, kind in _likely(bench, bench.x[0].shape[-1]):  # none for rows of another shape
        plain = some_columns(bench, bench.x[0], partial(_first_rows, bench, partial(cast, np.float64)))
        x, picks = kind.rows(bench.x[0]), {field: partial(_kept, kind.matrix) for field in bench.row.params}
        kept = partial(_first_rows, bench, kind.matrix)
        if some_columns(bench, bench.x[0], kept) <= TELLS * plain:
            yield Try(name, {"w": picks}, f"its weights are rounded to {kind.words}, the checkpoint's have more bits")
        if some_columns(bench, x, kept) <= TELLS * plain:
            words = f"its input and its weights are rounded to {kind.words}"
            yield Try(f"{name} both", {"w": picks, "x": {0: x}}, words)


def _likely(bench: Bench, width: int) -> Iterator[tuple[str, Kind]]:
    """The kinds whose error is of the size of the engine's, or greater where it is seen from afar."""
    for name, kind in KINDS.items():
        least = kind.error / NEAR if bench.shown else 0.0
        if width % kind.block == 0 and least <= bench.seen <= kind.error * NEAR:
            yield name, kind


def _first_rows(bench: Bench, rounded: Round, field: str) -> np.ndarray:
    whole = bench.matrix(field)
    return rounded(whole[:COLUMNS], whole)


def some_columns(bench: Bench, x: np.ndarray, first_rows: Callable[[str], np.ndarray]) -> float:
    """How far the first columns of each of the stage's matrices are from the engine's, with these rows of the fields.

    Nothing where the engine's are not shown, or do not matter.
    """
    if not bench.shown or bench.every:
        return 0.0
    experts, engine, start, apart = bench.case.experts, bench.engine, 0, 0.0
    at: Any = ... if experts is None else np.nonzero(experts == experts.flat[0])
    if experts is not None and x.ndim == 2:
        x = np.broadcast_to(x[:, None], (*experts.shape, x.shape[-1]))
    for field in bench.row.params:
        rows = first_rows(field)
        apart += np.square(x[at] @ rows.T - engine[at][..., start : start + len(rows)]).sum()
        start += bench.matrix(field).shape[0]
    return float(np.sqrt(apart))


def inputs(bench: Bench) -> Iterator[Try]:
    """What a product reads, rounded before it, alone or with its weights."""
    x = bench.x[0]
    for name, dtype in coarser(bench).items():
        rows = {0: cast(dtype, x)}
        yield Try(name, {"x": rows}, f"its input is rounded to {name} before the product")
        picks = {field: partial(_narrowed, dtype) for field in bench.row.params}
        yield Try(f"{name} both", {"x": rows, "w": picks}, f"its input and its weights are rounded to {name}")
    for name, kind in _likely(bench, x.shape[-1]):
        if kind.matrix is kind.rows or name == "Q8_0":  # of the other blocks the activations are Q8_0 too
            yield Try(name, {"x": {0: kind.rows(x)}}, f"its input is rounded to {kind.words}")


def _narrowed(dtype: Any, get: Get) -> np.ndarray:
    return cast(dtype, get())


def _kept(kind: Round, get: Get) -> np.ndarray:
    return kind(get())


def int8_result(bench: Bench) -> Iterator[Try]:
    """k as an int8 cache keeps it."""
    if coarser(bench):
        yield Try("int8", {"after": int8}, "its result is rounded to int8, a scale for each head and token")


def cached(bench: Bench) -> Iterator[Try]:
    """k or v read from a cache with fewer bits."""
    kinds: dict[str, Round] = {"int8": int8}
    kinds |= {name: partial(cast, dtype) for name, dtype in (FLOAT8 | coarser(bench)).items()}
    K, h, start = bench.config.num_key_value_heads, bench.config.head_dim, bench.settings.get("start", 0)
    rows = bench.x[1][:, start : start + K * h]
    for name, kind in kinds.items():
        kept = kind(rows.reshape(-1, K, h)).reshape(rows.shape)
        part = "v" if bench.stage == "attention" else "k"
        switches: dict[str, Any] = {"x": {1: kept}} | ({"start": 0} if start else {})
        yield Try(name, switches, f"{part} is read from a cache in {name}")
