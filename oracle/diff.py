"""Two tensor files, value by value: the twin of `apr diff --values`, with its figures and its JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from oracle.metrics import jsonable
from oracle.tensor_file import TensorFile, open_tensor
from weights import UserError

SCHEMA = "apr-stage-diff-v1"
BLOCK = 1 << 16


def diff(path_a: Path, path_b: Path, limit: int = 10) -> dict[str, Any]:
    """Figures of b against a over all values, blind to the stage's name; the `limit` greatest differences.

    Sums are float64. The cosine is 0.0 where a norm is 0; figures that are NaN are None. Raises `UserError` for broken
    files, and where dim_product or layer differ.
    """
    (layer_a, a), (layer_b, b) = open_tensor(path_a), open_tensor(path_b)
    for what, ours, theirs in (
        ("dim_product", a.values.size, b.values.size),
        ("layer", _name(layer_a), _name(layer_b)),
    ):
        if ours != theirs:
            raise UserError(f"{what} differs: {path_a} has {ours}, {path_b} has {theirs}")
    if not a.values.size:
        raise UserError(f"{path_a} and {path_b} hold no values, so there is nothing to compare")
    sums, greatest = _sums(a, b, limit)
    squares, aa, bb, ab = sums
    norms = math.sqrt(aa) * math.sqrt(bb)
    top = [_entry(index, a.values[index], b.values[index]) for index in greatest]
    first = greatest[0] if greatest else int(_order(np.asarray(a.values[:1]), np.asarray(b.values[:1])).argmax())
    return {
        "schema": SCHEMA,
        "path_a": str(path_a),
        "path_b": str(path_b),
        "layer": _name(layer_a),
        "dim_product": int(a.values.size),
        "max_abs_diff": _entry(first, a.values[first], b.values[first])["abs_diff"],
        "max_abs_diff_index": first,
        "rms_diff": jsonable(math.sqrt(squares / a.values.size)),
        "cosine_sim": jsonable(ab / norms if norms else 0.0),
        "top_diffs": top[:limit],
    }


def _name(layer: int | None) -> int | str:
    return "whole-model" if layer is None else layer


def _entry(index: int, a: Any, b: Any) -> dict[str, Any]:
    values = {"a": float(a), "b": float(b), "abs_diff": abs(float(a) - float(b))}
    return {"index": index, **{name: jsonable(value) for name, value in values.items()}}


def _sums(a: TensorFile, b: TensorFile, limit: int) -> tuple[np.ndarray, list[int]]:
    """Σ(b−a)², Σa², Σb², Σab, and the indices of the greatest differences, NaN before all."""
    sums, best = np.zeros(4), np.zeros((2, 0))
    keep = max(1, limit)
    for start in range(0, a.values.size, BLOCK):
        x, y = (file.values[start : start + BLOCK].astype(np.float64) for file in (a, b))
        with np.errstate(all="ignore"):
            d = y - x
            sums += [float(np.einsum("i,i->", p, q)) for p, q in ((d, d), (x, x), (y, y), (x, y))]
        order = _order(x, y)
        near = np.argpartition(-order, keep - 1)[:keep] if order.size > keep else np.arange(order.size)
        best = np.concatenate([best, [order[near], near + start]], axis=1)
        best = best[:, np.lexsort((best[1], -best[0]))[:keep]]
    return sums, best[1].astype(np.int64).tolist()


def _order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|y − x|, infinite where that is NaN but the two are not the same."""
    with np.errstate(all="ignore"):
        d = np.abs(y.astype(np.float64) - x)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    return np.where(np.isnan(d), np.where(same, 0.0, np.inf), d)
