"""Hypotheses about what attention reads of k and v, and about where it puts its heads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxref.stages import STAGES
from oracle.bench import Bench
from oracle.tries import Try
from oracle.variants_attention import rope


def values_rotated(bench: Bench) -> Iterator[Try]:
    """RoPE on v, as where the packed row is rotated as a whole."""
    settings = STAGES["k_post_rope"].settings(bench.config, bench.layer or 0)
    rows = _values(bench)
    turned = rope([rows, np.arange(len(rows))], {}, settings | {"start": 0})
    yield Try(None, {"x": {1: turned}, "start": 0}, "v is rotated too")


def shifted(bench: Bench) -> Iterator[Try]:
    """Rows of k or v that lie a position early or late; what is then in the free place, zeros or the last row's."""
    part, start = ("v", {"start": 0}) if bench.stage == "attention" else ("k", {})
    rows = _values(bench) if part == "v" else bench.x[1]
    for step in (1, -1):
        moved = np.roll(rows, step, axis=0)
        free = moved.copy()
        free[0 if step > 0 else -1] = 0
        where = "late" if step > 0 else "early"
        for name, found in (("", moved), (" and zeros", free)):
            words = f"{part} is read from a cache in which each row lies a position too {where}{name}"
            yield Try(f"{step:+d}{name}", {"x": {1: found}, **start}, words)


def untransposed(bench: Bench) -> Iterator[Try]:
    """Tokens and heads not exchanged before the product: [S, heads, h] taken for [heads, S, h], or the other way."""
    h, count = bench.config.head_dim, bench.replay.engine.count
    whole, start = {"q": (0, bench.x[0]), "k": (1, bench.x[1])}, {}
    if bench.stage == "attention":
        whole, start = {"v": (1, _values(bench))}, {"start": 0}
    if any(len(rows) != count for _, rows in whole.values()):
        return
    for lies, taken in (("[S, heads, h]", "[heads, S, h]"), ("[heads, S, h]", "[S, heads, h]")):
        shape = (-1, count, h) if taken.startswith("[heads") else (count, -1, h)
        for parts in dict.fromkeys((*whole, "".join(whole))):
            x = {
                i: rows.reshape(shape).swapaxes(0, 1).reshape(rows.shape) for i, rows in (whole[part] for part in parts)
            }
            yield Try(f"{parts} {lies}", {"x": x, **start}, f"{' and '.join(parts)} {lies} is taken for {taken}")


def head_order(bench: Bench) -> Iterator[Try]:
    """Heads of the result in another order: reversed, group-minor, or any that fits."""
    H, K, h = bench.config.num_attention_heads, bench.config.num_key_value_heads, bench.config.head_dim
    orders = {"reversed": np.arange(H)[::-1], "group-minor": np.arange(H).reshape(K, -1).T.ravel()}
    exact = bench.run({})
    if bench.shown and exact.shape == bench.engine.shape and np.isfinite(bench.engine).all():
        ours, theirs = (a.reshape(len(a), H, h) for a in (exact, bench.engine))
        apart = np.stack([np.square(theirs - ours[:, head, None]).sum(axis=(0, 2)) for head in range(H)])
        orders["other"] = apart.argmin(axis=0)  # of each place the nearest right head
    for name, order in orders.items():
        if sorted(order.tolist()) == list(range(H)) and (order != np.arange(H)).any():
            yield Try(name, {"order": order}, f"its heads stand in another order: {order.tolist()}")


def _values(bench: Bench) -> np.ndarray:
    """The rows of v [T, K·h] in the packed ones."""
    start, width = bench.settings["start"], bench.config.kv_width
    return bench.x[1][:, start : start + width]
