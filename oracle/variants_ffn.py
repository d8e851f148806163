"""Activations, the router and the sum over experts in NumPy float64, with switches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.special import erf, expit

from oracle import variants_overflow as overflow
from oracle.variants_attention import Array, Switches

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * expit(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.square(np.maximum(x, 0)),
    "gelu_quick": lambda x: x * expit(1.702 * x),
    "sigmoid": expit,
    "tanh": np.tanh,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    **{f"silu in {kind}": partial(overflow.silu, kind=kind) for kind in overflow.RANGES},
}


def silu(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`activation` in its place."""
    return ACTIVATIONS[s.get("activation", "silu")](x[0])


def multiply(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """silu(gate)·up; with `gate`, silu(gate·up); `both`: silu(gate)·silu(up); `up` as in `_other_up`."""
    if "up" in s:
        return _other_up(x[0], x[1], s["up"])
    up = ACTIVATIONS["silu"](x[1]) if s.get("both") else x[1]
    return ACTIVATIONS["silu"](s["gate"] * up) if "gate" in s else x[0] * up


def swiglu(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`activation`; `on_product`; `both`: silu(gate)·silu(up); `exchanged`: silu(up)·gate; `up`."""
    gate, up = x[::-1] if s.get("exchanged") else x
    act = ACTIVATIONS[s.get("activation", "silu")]
    if "up" in s:
        return _other_up(act(gate), up, s["up"])
    up = act(up) if s.get("both") else up
    return act(gate * up) if s.get("on_product") else act(gate) * up


def _other_up(act: Array, up: Array, how: str) -> Array:
    """`how` silu(gate) meets up: "missing", "added", or "plus_one" as in GPT-OSS."""
    return {"missing": act, "added": act + up, "plus_one": act * (up + 1)}[how]


def moe_router(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`renormalise`, `count`, `kind` ("softmax", "sigmoid", "after": over the chosen
    alone, "twice", "equal", "raw": the logits), `logits` as a dtype.

    `times` multiplies the weights; `ids` [rows, A] are the chosen experts.
    """
    return s.get("times", 1.0) * _router(x, s)


def _router(x: list[Array], s: Switches) -> Array:
    logits = x[0].astype(s["logits"]).astype(np.float64) if "logits" in s else x[0]
    chances = expit(logits) if s.get("kind") == "sigmoid" else _softmax(logits)
    best = s["ids"] if "ids" in s else np.argsort(-logits, axis=1, kind="stable")[:, : s["count"]]
    if s.get("kind") == "after":
        return _softmax(np.take_along_axis(logits, best, axis=1))
    if s.get("kind") == "raw":
        return np.take_along_axis(logits, best, axis=1)
    if s.get("kind") == "equal":
        return np.full(best.shape, 1 / best.shape[1])
    found = np.take_along_axis(chances, best, axis=1)
    if s.get("kind") == "twice":
        return _softmax(found / found.sum(axis=1, keepdims=True) if s["renormalise"] else found)
    return found / found.sum(axis=1, keepdims=True) if s["renormalise"] else found


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def moe_ffn_out(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`power` of the weights; `backwards`: their order; `rolled`: by ranks; `lost`: a rank left out; `times`.

    `kept` [S, A]: which outputs are added.
    """
    weights = x[1] ** s.get("power", 1)
    weights = np.roll(weights[:, ::-1] if s.get("backwards") else weights, s.get("rolled", 0), axis=1)
    if "lost" in s:
        weights = np.where(np.arange(weights.shape[1]) == s["lost"], 0.0, weights)
    return s.get("times", 1.0) * np.einsum("sad,sa->sd", x[0], weights * s.get("kept", 1.0))
