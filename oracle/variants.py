"""The stages once more in NumPy float64, with a switch for everything that engines get wrong.

Without switches each gives what `jaxref` gives, which a test checks. A hypothesis is some switches with their values;
those of two hypotheses together are a third. `x` are a stage's inputs, `w` its weights by field.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np

from jaxref.stages import STAGES
from oracle.variants_attention import Array, Switches, attention, attn_scores, attn_softmax, capped, rope
from oracle.variants_ffn import moe_ffn_out, moe_router, multiply, silu, swiglu
from oracle.variants_overflow import SLACK, mean_square


def norm(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """RMSNorm of rows: `skip`, `centre` (LayerNorm), `eps`, `outside`: where eps is added; `size`: "sum", "absolute"
    or "unrooted", of `counted` columns; `squares` as in `mean_square`; `sizes`, applied to all rows' mean squares.
    `unit`: the dtype of what the weight meets, beside what is `shown` of the result. The weight: `power`, 0 for none,
    `plus_one`, and `weight_first`.
    """
    (weight,) = w.values()
    return x[0] if s.get("skip") else _normed(x[0], weight, s)


def head_norm(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """RMSNorm of each head: as `norm`, and `row`: over all heads together; `halves`: over each half of a head."""
    (weight,) = w.values()
    heads, h = s["heads"], weight.shape[0]
    part = x[0][:, s["start"] : s["start"] + heads * h]
    if s.get("skip"):
        return part
    if s.get("row"):
        return _normed(part, np.tile(weight, heads), s)
    parts = 2 if s.get("halves") else 1
    return _normed(part.reshape(-1, heads, parts, h // parts), weight.reshape(parts, -1), s).reshape(part.shape)


def _normed(x: Array, weight: Array, s: Switches) -> Array:
    if s.get("weight_first"):
        x, weight = x * weight, np.ones_like(weight)
    if s.get("centre"):
        x = x - x.mean(axis=-1, keepdims=True)
    counted, outside = np.arange(x.shape[-1]) < s.get("counted", x.shape[-1]), s.get("outside")
    if "squares" in s:
        size = mean_square(x, counted, s["squares"])
    else:
        size = np.square(x) * counted if "counted" in s else np.square(x)
        size = size.sum(axis=-1, keepdims=True) / x.shape[-1]
    size = s["sizes"](size) if "sizes" in s else size
    if s.get("size") == "sum":
        size = size * x.shape[-1]
    if s.get("size") == "absolute":
        unit = x / (np.abs(x).mean(axis=-1, keepdims=True) + s["eps"])
    elif s.get("size") == "unrooted":
        unit = x / (size + s["eps"])
    elif outside == "reciprocal":
        unit = x * (1 / np.sqrt(size) + s["eps"])
    else:
        unit = x / (np.sqrt(size) + s["eps"] if outside == "root" else np.sqrt(size + s["eps"]))
    factor = weight + 1 if s.get("plus_one") else weight
    factor = factor ** s["power"] if "power" in s else factor
    return _rounded_unit(unit, factor, s) if "unit" in s else unit * factor


def _rounded_unit(unit: Array, factor: Array, s: Switches) -> Array:
    """The normed value in fewer bits before its weight. Near a half either neighbour is right: the engine's."""
    below, above = ((unit + slack).astype(s["unit"]).astype(np.float64) * factor for slack in _slack(unit))
    shown = s["shown"].reshape(unit.shape) if "shown" in s else unit * factor
    return np.where(np.abs(below - shown) < np.abs(above - shown), below, above)


def _slack(values: Array) -> tuple[Array, Array]:
    """How far below and above the engine's own float32 may be of these."""
    slack = SLACK * (np.abs(values) + np.sqrt(np.square(values).mean()))
    return -slack, slack


def qkv_matmul(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """Three products side by side; `order`: which matrix stands where; `rows`: of columns; `parts`: factors."""
    parts, order = s.get("parts", {}), s.get("order", "qkv")
    found = np.concatenate([parts.get(p, 1) * (x[0] @ w[f"{o}_proj"].T) for p, o in zip("qkv", order, strict=True)], -1)
    return found[:, s["rows"]] if "rows" in s else found


def qkv_bias(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`times`: how often each part's bias is added; `rows`: to which rows [S, 1]; `parts`: factors of what follows."""
    times, parts = s.get("times", {}), s.get("parts", {})
    factors = np.concatenate([np.full(len(w[f"{part}_bias"]), float(parts.get(part, 1))) for part in "qkv"])
    added = np.concatenate([times.get(part, 1) * w[f"{part}_bias"] for part in "qkv"])
    return factors * (x[0] + added * s.get("rows", 1))


def linear(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """x·Wᵀ; `plus` is added, `times` multiplied, `cap` caps; `after` is applied to the rows."""
    (weight,) = w.values()
    found = capped(s.get("times", 1.0) * (x[0] @ weight.T) + s.get("plus", 0.0), s)
    return s["after"](found) if "after" in s else found


def add(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`first` and `second`: how often each is added."""
    return s.get("first", 1) * x[0] + s.get("second", 1) * x[1]


def embed(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`times`; `rows`: other rows [S, D]."""
    return s.get("times", 1.0) * (s["rows"] if "rows" in s else w["embed_tokens"][x[0]])


_BY_FUNCTION = {f.__name__: f for f in (qkv_matmul, qkv_bias, head_norm, rope, attn_scores, attn_softmax, attention)}
_BY_FUNCTION |= {f.__name__: f for f in (linear, add, silu, multiply, swiglu, moe_router, moe_ffn_out, embed)}
_BY_FUNCTION["rms_norm"] = norm


@cache
def variant_of(stage: str) -> Callable[[list[Array], dict[str, Array], Switches], Array] | None:
    """The function with switches of a stage; None for the experts' ids, which are judged otherwise.

    Of each: `owners`, whose rows stand where; `stored`, the dtype that the result is rounded to, and `shown`, what an
    engine has in its place.
    """
    function = _BY_FUNCTION.get(getattr(STAGES[stage].function, "__name__", ""))
    return None if function is None else partial(_stored, function)


def _stored(function: Callable[..., Array], x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    found = function(x, w, s)
    found = found[s["owners"]] if "owners" in s else found
    if "stored" not in s:
        return found
    rounded, shown = found.astype(s["stored"]).astype(np.float64), s.get("shown")
    # Between two values of that type the engine's own float32 decides: either of them is right.
    if shown is not None:
        for slack in _slack(found):
            rounded = np.where((found + slack).astype(s["stored"]) == shown, shown, rounded)
    return rounded
