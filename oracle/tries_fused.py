"""Hypotheses about fused matrices that are split in another way than they were put together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from oracle.bench import Bench, Get, Pick
from oracle.tries import Try


def grouped(bench: Bench) -> Iterator[Try]:
    """Rows of a fused q, k and v that lie group by group, each with its q heads, its k and its v, or are read so."""
    H, K = bench.config.num_attention_heads, bench.config.num_key_value_heads
    h, group = bench.config.head_dim, H // K
    heads = np.arange(H + 2 * K)
    parts = (heads[:H].reshape(K, group), heads[H : H + K, None], heads[H + K :, None])
    by_group = np.concatenate(parts, axis=1).ravel()
    for name, order in (("flat", by_group), ("grouped", np.argsort(by_group))):
        rows = (order[:, None] * h + np.arange(h)).ravel()
        said = ("group by group", "q, then k, then v") if name == "flat" else ("q, then k, then v", "group by group")
        yield Try(name, {"rows": rows}, f"the rows of the fused q, k and v lie {said[0]} and are read as {said[1]}")


def interleaved(bench: Bench) -> Iterator[Try]:
    """Rows of a fused gate and up in turns, read as halves, or the other way round."""
    (field,) = bench.row.params
    for name, said in (
        ("turns", "lie as halves and are read in turns"),
        ("halves", "lie in turns, are read as halves"),
    ):
        pick: Pick = partial(_split, name, field == "up_proj")
        yield Try(name, {"w": {field: pick}}, f"the rows of the fused gate and up {said}")


def _split(name: str, second: bool, get: Get) -> np.ndarray:
    gate, up = get("gate_proj"), get("up_proj")
    if name == "turns":
        return np.concatenate([gate, up])[int(second) :: 2]
    rows = np.stack([gate, up], axis=1).reshape(2 * len(gate), -1)
    return rows[len(gate) :] if second else rows[: len(gate)]
