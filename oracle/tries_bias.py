"""Hypotheses about the biases of q, k and v: of another layer, exchanged, or with their rows in another order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from oracle.bench import Bench, Get, Pick
from oracle.tries import Try


def head_norm_permuted(bench: Bench) -> Iterator[Try]:
    """A head norm's weight in turns from its halves, as q and k are permuted for Llama."""
    (field,) = bench.row.params
    for kind, shape in (("turns", (1, 2, -1)), ("halves", (1, bench.config.head_dim // 2, 2))):
        yield Try(kind, {"w": {field: partial(_turned, shape)}}, f"{field} lies in {kind}, as in Llama's GGUF")


def neighbour(bench: Bench) -> Iterator[Try]:
    """The biases of the other layer that what was added is nearest to."""
    layer, count = bench.layer, bench.config.num_hidden_layers
    if layer is None or count == 1:
        return
    added = np.nan_to_num((bench.engine - bench.x[0]).mean(axis=0))

    def apart(other: int) -> float:
        return float(np.square(added - _packed(bench, other)).sum())

    nearest = min((i for i in range(count) if i != layer), key=apart)
    picks: dict[str, Pick] = {field: partial(_of_layer, field, nearest) for field in bench.row.params}
    words = f"the biases of layer {nearest} in place of layer {layer}"
    yield Try("qkv", {"w": picks}, words)
    for field, pick in picks.items():
        yield Try(field, {"w": {field: pick}}, f"{field} of layer {nearest} in place of layer {layer}")


def _packed(bench: Bench, layer: int) -> np.ndarray:
    return np.concatenate([bench.tensor(field, layer) for field in bench.row.params])


def _of_layer(field: str, layer: int, get: Get) -> np.ndarray:
    return get(field, layer)


def first_alone(bench: Bench) -> Iterator[Try]:
    """The bias where a loop over tokens or heads is missing: at the first token, or of the first head for all."""
    yield Try("token", {"rows": _is_first(bench)}, "it is added to the first token alone")
    for parts in ("qkv", "qk", "q", "k", "v"):
        picks: dict[str, Pick] = {f"{part}_bias": partial(_first_head, bench.config.head_dim) for part in parts}
        words = f"all heads of {', '.join(parts)} have the bias of the first one"
        yield Try(f"{parts} head", {"w": picks}, words)


def _is_first(bench: Bench) -> np.ndarray:
    return (np.asarray(bench.case.positions) == 0)[:, None]


def _first_head(width: int, get: Get) -> np.ndarray:
    bias = get()
    return np.tile(bias[:width], len(bias) // width)


def exchanged(bench: Bench) -> Iterator[Try]:
    """The biases of two parts in each other's place, where they have one size."""
    for a, b in ("kv", "qk", "qv"):
        first, second = f"{a}_bias", f"{b}_bias"
        if bench.tensor(first).shape == bench.tensor(second).shape:
            picks: dict[str, Pick] = {first: partial(_named, second), second: partial(_named, first)}
            yield Try(a + b, {"w": picks}, f"the biases of {a} and {b} are exchanged")


def _named(field: str, get: Get) -> np.ndarray:
    return get(field)


def permuted(bench: Bench) -> Iterator[Try]:
    """Values of each head in turns from its halves, as permuted for Llama, or the other way round."""
    h = bench.config.head_dim
    for kind, shape in (("turns", (-1, 2, h // 2)), ("halves", (-1, h // 2, 2))):
        for parts in ("qk", "q", "k"):
            picks: dict[str, Pick] = {f"{part}_bias": partial(_turned, shape) for part in parts}
            words = f"the bias of {' and '.join(parts)} lies in {kind} in each head, as in Llama's GGUF"
            yield Try(f"{parts} {kind}", {"w": picks}, words)


def _turned(shape: tuple[int, int, int], get: Get) -> np.ndarray:
    return get().reshape(shape).swapaxes(1, 2).ravel()
