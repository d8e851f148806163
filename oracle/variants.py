"""The stages once more in NumPy float64, with a switch for everything that engines get wrong.

Without switches each gives what `jaxref` gives, which a test checks. A hypothesis is some switches with their values;
those of two hypotheses together are a third. `x` are a stage's inputs, `w` its weights by field.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy.special import erf, expit

from jaxref.rope import inverse_frequencies
from jaxref.stages import STAGES

Array = np.ndarray
Switches = dict[str, Any]
# How far from exact float32 may be where it is rounded further: a sum of a thousand terms.
SLACK = 2.0**-20


def norm(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """RMSNorm of rows: `skip`, `centre` (LayerNorm), `eps`, `outside`: where eps is added; `size`: "sum" or "absolute".

    The weight: `power`, 0 for none, and `plus_one`.
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
    if s.get("centre"):
        x = x - x.mean(axis=-1, keepdims=True)
    size, outside = np.square(x).mean(axis=-1, keepdims=True), s.get("outside")
    if s.get("size") == "sum":
        size = size * x.shape[-1]
    if s.get("size") == "absolute":
        unit = x / (np.abs(x).mean(axis=-1, keepdims=True) + s["eps"])
    elif outside == "reciprocal":
        unit = x * (1 / np.sqrt(size) + s["eps"])
    else:
        unit = x / (np.sqrt(size) + s["eps"] if outside == "root" else np.sqrt(size + s["eps"]))
    return unit * (weight + 1 if s.get("plus_one") else weight) ** s.get("power", 1)


def qkv_matmul(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """Three products side by side; `order`: which matrix stands where."""
    return np.concatenate([x[0] @ w[f"{part}_proj"].T for part in s.get("order", "qkv")], axis=-1)


def qkv_bias(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`times`: how often each part's bias is added."""
    times = s.get("times", {})
    return x[0] + np.concatenate([times.get(part, 1) * w[f"{part}_bias"] for part in "qkv"])


def rope(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """RoPE: `interleaved`, `theta`, `offset`, `sign`, `stretch`, `partial`, `scaling`, `magnitude`, `tables`, `skip`.

    `raw` are rows to rotate instead; `after` is applied to what was rotated [S, heads, h]; `offset` may be one a row.
    """
    heads, h = s["heads"], s["head_dim"]
    values = s.get("raw", x[0])
    values = values[:, s["raw_start" if "raw" in s else "start"] :][:, : heads * h].reshape(-1, heads, h)
    if s.get("skip"):
        return values.reshape(len(values), -1)
    width = int(h * s.get("partial", 1.0))
    frequencies = s["frequencies"] if "frequencies" in s else inverse_frequencies(width, s["theta"], s["scaling"])
    positions = x[1] + np.asarray(s.get("offset", 0))
    angles = s.get("sign", 1) * positions[:, None, None] * frequencies / s.get("stretch", 1.0)
    magnitude = s.get("magnitude", 1.0 if s["scaling"] is None else s["scaling"].attention_factor)
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    if tables := s.get("tables"):
        cos, sin = (t.astype(tables).astype(np.float64) for t in (cos, sin))
    turned, rest = values[..., :width], values[..., width:]
    if s.get("interleaved"):
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = np.split(turned, 2, axis=-1)
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    found = np.concatenate([turned, rest], axis=-1)
    found = s["after"](found) if "after" in s else found
    return found.reshape(len(found), -1)


def attn_scores(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`scale` for 1/√h and `times` it; `kv_map`: the kv head of each query head; `cap` as in `linear`."""
    h, K = s["head_dim"], s["kv_heads"]
    q, k = (a.reshape(len(a), -1, h) for a in x)
    kv_map = s.get("kv_map", np.arange(q.shape[1]) // (q.shape[1] // K))
    scale = s.get("scale", h**-0.5) * s.get("times", 1.0)
    return capped(np.einsum("sjh,tjh->jst", q, k[:, kv_map], optimize=True) * scale, s)


def capped(x: Array, s: Switches) -> Array:
    """c·tanh(x/c) with `cap` for c."""
    return s["cap"] * np.tanh(x / s["cap"]) if "cap" in s else x


def attn_softmax(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`nearest` and `window`: how far back keys are seen; `unmasked`, `over_queries`, `masked_after`, `undivided`.

    Of the scores: `cap`, and `heat`, which they are multiplied with (0: a mean over keys).
    """
    back = x[1][:, None] - x[2][None, :]
    seen = back >= s.get("nearest", 0)
    if s.get("nearest", 0) > 0:
        seen |= (x[1][:, None] == 0) & (back == 0)  # a softmax over nothing would be a NaN
    if s["window"] is not None:
        seen &= back < s["window"]
    if s.get("unmasked"):
        seen = np.ones_like(seen)
    allowed = np.ones_like(seen) if s.get("masked_after") else seen
    axis = -2 if s.get("over_queries") else -1
    masked = np.where(allowed, s.get("heat", 1.0) * capped(x[0], s), -np.inf)
    with np.errstate(invalid="ignore"):
        powers = np.exp(masked - masked.max(axis=axis, keepdims=True))
    found = np.nan_to_num(powers / (1 if s.get("undivided") else powers.sum(axis=axis, keepdims=True)))
    return np.where(seen, found, 0.0)


def attention(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """softmax·V; `kv_map` as for the scores; `unmerged`: [H, S, h] read as [S, H·h]."""
    heads, K, h = x[0].shape[0], s["kv_heads"], s["head_dim"]
    v = x[1][:, s["start"] : s["start"] + K * h].reshape(-1, K, h)
    kv_map = s.get("kv_map", np.arange(heads) // (heads // K))
    mixed = np.einsum("jst,tjh->sjh", x[0], v[:, kv_map], optimize=True)
    mixed = mixed.swapaxes(0, 1).reshape(mixed.shape) if s.get("unmerged") else mixed
    return mixed.reshape(len(mixed), -1)


def linear(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """x·Wᵀ; `plus` is added, `times` multiplied, `cap` caps."""
    (weight,) = w.values()
    return capped(s.get("times", 1.0) * (x[0] @ weight.T) + s.get("plus", 0.0), s)


def add(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`first` and `second`: how often each is added."""
    return s.get("first", 1) * x[0] + s.get("second", 1) * x[1]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * expit(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.square(np.maximum(x, 0)),
    "gelu_quick": lambda x: x * expit(1.702 * x),
    "sigmoid": expit,
}


def silu(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`activation` in its place."""
    return ACTIVATIONS[s.get("activation", "silu")](x[0])


def multiply(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """silu(gate)·up; with `gate`, silu(gate·up); `both`: silu(gate)·silu(up)."""
    up = ACTIVATIONS["silu"](x[1]) if s.get("both") else x[1]
    return ACTIVATIONS["silu"](s["gate"] * up) if "gate" in s else x[0] * up


def swiglu(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`activation`; `on_product`; `both`: silu(gate)·silu(up); `exchanged`: silu(up)·gate."""
    gate, up = x[::-1] if s.get("exchanged") else x
    act = ACTIVATIONS[s.get("activation", "silu")]
    up = act(up) if s.get("both") else up
    return act(gate * up) if s.get("on_product") else act(gate) * up


def moe_router(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`renormalise`, `count`, `kind` ("softmax", "sigmoid", "after": over the chosen alone), `logits` as a dtype.

    `times` multiplies the weights.
    """
    return s.get("times", 1.0) * _router(x, s)


def _router(x: list[Array], s: Switches) -> Array:
    logits = x[0].astype(s["logits"]).astype(np.float64) if "logits" in s else x[0]
    chances = expit(logits) if s.get("kind") == "sigmoid" else _softmax(logits)
    best = np.argsort(-logits, axis=1, kind="stable")[:, : s["count"]]
    if s.get("kind") == "after":
        return _softmax(np.take_along_axis(logits, best, axis=1))
    found = np.take_along_axis(chances, best, axis=1)
    return found / found.sum(axis=1, keepdims=True) if s["renormalise"] else found


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def moe_ffn_out(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`power` of the weights; `backwards`: their order; `rolled`: by ranks; `lost`: a rank left out; `times`."""
    weights = x[1] ** s.get("power", 1)
    weights = np.roll(weights[:, ::-1] if s.get("backwards") else weights, s.get("rolled", 0), axis=1)
    if "lost" in s:
        weights = np.where(np.arange(weights.shape[1]) == s["lost"], 0.0, weights)
    return s.get("times", 1.0) * np.einsum("sad,sa->sd", x[0], weights)


def embed(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`times`; `rows`: other rows [S, D]."""
    return s.get("times", 1.0) * (s["rows"] if "rows" in s else w["embed_tokens"][x[0]])


_BY_FUNCTION = {f.__name__: f for f in (qkv_matmul, qkv_bias, head_norm, rope, attn_scores, attn_softmax, attention)}
_BY_FUNCTION |= {f.__name__: f for f in (linear, add, silu, multiply, swiglu, moe_router, moe_ffn_out, embed)}
_BY_FUNCTION["rms_norm"] = norm


def variant_of(stage: str) -> Callable[[list[Array], dict[str, Array], Switches], Array] | None:
    """The function with switches of a stage; None for the experts' ids, which are judged otherwise.

    Of each: `stored`, the dtype that the result is rounded to, and `shown`, what an engine has in its place.
    """
    function = _BY_FUNCTION.get(getattr(STAGES[stage].function, "__name__", ""))
    return None if function is None else partial(_stored, function)


def _stored(function: Callable[..., Array], x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    found = function(x, w, s)
    if "stored" not in s:
        return found
    rounded, shown = found.astype(s["stored"]).astype(np.float64), s.get("shown")
    # Between two values of that type the engine's own float32 decides: either of them is right.
    if shown is not None:
        slack = SLACK * (np.abs(found) + np.sqrt(np.square(found).mean()))
        for other in (found - slack, found + slack):
            rounded = np.where(other.astype(s["stored"]) == shown, shown, rounded)
    return rounded
