"""How each hypothesis is tried: its variants for one stage, with the parameters that they find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from oracle import fits
from oracle.bench import Bench, Get, Pick
from oracle.variants import Switches


@dataclass(frozen=True)
class Try:
    """One variant of a hypothesis: its parameter, the switches, and how a person says it.

    One that is `fitted` to the engine's rows is believed only where it leaves no more than the floor. At several stages
    at once those are tried that agree in `together`, by default the parameter.
    """

    parameter: Any
    switches: Switches
    words: str
    fitted: bool = False
    together: Any = None


Tries = Callable[[Bench], Iterable[Try]]


def switch(words: str, parameter: Any = None, **switches: Any) -> Tries:
    """A hypothesis without anything to find out."""
    return lambda bench: (Try(parameter, switches, words),)


def each(words: str, name: str, *values: Any) -> Tries:
    """One switch with several values; `{}` in the words is the value."""
    return lambda bench: (Try(value, {name: value}, words.format(value)) for value in values)


# --- norms

_OTHER = {
    "attn_norm": "post_attention_layernorm",
    "ffn_norm": "input_layernorm",
    "q_norm": "k_norm",
    "k_norm": "q_norm",
}
_LAYERS = ("input_layernorm", "post_attention_layernorm")


def eps(bench: Bench) -> Iterator[Try]:
    """Another eps: those that people use, and a fitted one."""
    for eps in fits.epsilons(bench):
        words = f"eps = {eps:g} (the config says {bench.settings['eps']:g})"
        yield Try(eps, {"eps": eps}, words, fitted=eps not in fits.EPSILONS)


def other_norm(bench: Bench) -> Iterator[Try]:
    """The weight of the layer's other norm, or of the other head norm; for the final norm that of a layer's."""
    if bench.layer is None:
        for name in (f"model.layers.{i}.{f}.weight" for i in (0, bench.config.num_hidden_layers - 1) for f in _LAYERS):
            pick: Pick = lambda get, name=name: get(name)  # noqa: E731
            yield Try(name, {"w": {bench.row.params[0]: pick}}, f"{name} in its place", together="other")
        return
    field = _OTHER[bench.stage]
    words, switches = f"the weight of {field} in its place", {"w": {bench.row.params[0]: lambda get: get(field)}}
    yield Try(field, switches, words, together="other")


def neighbour(bench: Bench) -> Iterator[Try]:
    """A weight of another layer, the nearest ones first."""
    if bench.layer is None:
        return
    count = bench.config.num_hidden_layers
    for layer in dict.fromkeys((bench.layer + 1, bench.layer - 1, 0, count - 1, *range(min(count, 8)))):
        if not 0 <= layer < count or layer == bench.layer:
            continue
        fields = bench.row.params
        if len(fields) > 1 and all(bench.has(field, layer) for field in fields):
            picks: dict[str, Pick] = {f: lambda get, f=f, layer=layer: get(f, layer) for f in fields}
            words = f"{', '.join(fields)} of layer {layer} in place of layer {bench.layer}"
            yield Try("all", {"w": picks}, words, together=layer)
        for field in bench.row.params:
            if bench.has(field, layer):
                pick: Pick = lambda get, field=field, layer=layer: get(field, layer)  # noqa: E731
                words = f"{field} of layer {layer} in place of layer {bench.layer}"
                yield Try(field, {"w": {field: pick}}, words, together=layer)


# --- projections


def order(bench: Bench) -> Iterator[Try]:
    """The matrices of q, k and v in another order, where their shapes allow it."""
    for order in ("qvk", "kqv", "kvq", "vqk", "vkq", "qkk", "qvv"):
        yield Try(order, {"order": order}, f"q, k and v are computed with the matrices of {', '.join(order)}")


def bias(bench: Bench, times: int) -> Iterator[Try]:
    """The bias of some parts, added `times` times."""
    for parts in ("qkv", "q", "k", "v", "qk", "qv"):
        how = {0: "missing", 2: "added twice", -1: "subtracted"}[times]
        words = f"the bias of {', '.join(parts)} is {how}"
        yield Try(parts, {"times": dict.fromkeys(parts, times)}, words)


def transposed(bench: Bench) -> Iterator[Try]:
    """The buffer of a matrix read as [in, out], or one that lies as [in, out] read as it is."""
    for field in bench.row.params:
        pick: Pick = lambda get, field=field: (m := get(field)).reshape(m.shape[::-1]).T  # noqa: E731
        yield Try(field, {"w": {field: pick}}, f"{field} is read as [in, out], its rows as columns")
        turned: Pick = lambda get, field=field: (m := get(field)).T.reshape(m.shape)  # noqa: E731
        yield Try(field, {"w": {field: turned}}, f"{field} lies as [in, out], and its columns are read as rows")


def bits(bench: Bench) -> Iterator[Try]:
    """The bfloat16 values of a matrix read as float16, or where it is stored in float16 the other way round."""
    for field in bench.row.params:
        half = bench.stored_as(field) in ("float16", "F16")
        pick: Pick = lambda get, half=half: float_bits(get(), half)  # noqa: E731
        stored, other = ("float16", "bfloat16") if half else ("bfloat16", "float16")
        yield Try(field, {"w": {field: pick}}, f"the {stored} values of {field} are read as {other}")


def float_bits(matrix: np.ndarray, half: bool) -> np.ndarray:
    """The bits of bfloat16 values read as float16; of float16 ones (`half`) as bfloat16."""
    if half:
        return matrix.astype(np.float16).view(ml_dtypes.bfloat16).astype(np.float64)
    upper = matrix.astype(np.float32).view(np.uint32) >> 16  # which is a bfloat16
    return upper.astype(np.uint16).view(np.float16).astype(np.float64)


def permuted(bench: Bench) -> Iterator[Try]:
    """Rows of each head taken in turns from its halves (as for Llama), the other way round, or heads exchanged."""
    h, fields = bench.config.head_dim, bench.row.params
    for field in (f for f in fields if f in ("q_proj", "k_proj")):
        for words, shape in (("turns", (-1, 2, h // 2)), ("halves", (-1, h // 2, 2))):

            def pick(get: Get, field: str = field, shape: tuple[int, int, int] = shape) -> np.ndarray:
                matrix = get(field)
                return matrix.reshape(*shape, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)

            yield Try(
                field, {"w": {field: pick}}, f"the rows of each head of {field} lie in {words}, as in Llama's GGUF"
            )
    for field, order in fits.head_orders(bench):

        def heads(get: Get, field: str = field, order: np.ndarray = order) -> np.ndarray:
            matrix = get(field)
            return matrix.reshape(len(order), -1, matrix.shape[-1])[order].reshape(matrix.shape)

        moved = [int(i) for i in np.flatnonzero(order != np.arange(len(order)))]
        yield Try(field, {"w": {field: heads}}, f"heads {moved} of {field} stand in another order: {order.tolist()}")


def exchanged(pairs: dict[str, str]) -> Tries:
    """Another matrix of the same layer or expert in its place."""

    def tries(bench: Bench) -> Iterator[Try]:
        (field,) = bench.row.params
        other = pairs[field]
        yield Try(None, {"w": {field: lambda get: get(other)}}, f"{other} in place of {field}")

    return tries


def head_order(bench: Bench) -> Iterator[Try]:
    """Heads in another order before the output projection."""
    x, h = bench.x[0], bench.config.head_dim
    by_head = x.reshape(len(x), -1, h)
    turned = {"reversed": by_head[:, ::-1], "transposed": by_head.swapaxes(1, 2)}
    K = bench.config.num_key_value_heads
    turned["kv-major"] = by_head.reshape(len(x), K, -1, h).swapaxes(1, 2)
    if len(x) == bench.replay.engine.count:
        turned["unmerged"] = by_head.swapaxes(0, 1)  # [H, S, h] read as [S, H·h]
    for name, value in turned.items():
        yield Try(name, {"x": {0: value.reshape(x.shape)}}, f"o_proj reads the heads {name}")


def same_for_all(bench: Bench) -> Iterator[Try]:
    """One vector added at every token."""
    plus = fits.common_offset(bench)
    if plus is not None:
        yield Try(None, {"plus": plus}, "the same vector is added at every token, as a bias would be")


# --- residuals, activations


def normed(bench: Bench) -> Iterator[Try]:
    """The branch added to the normed state."""
    normed = bench.value("attn_norm" if bench.stage == "post_attn_residual" else "ffn_norm")
    if normed is not None:
        yield Try(None, {"x": {0: normed}}, "the branch is added to the normed state, not to the hidden one")


def branches(bench: Bench) -> Iterator[Try]:
    """Factors of the hidden state and of the branch, as least squares tell them."""
    first, second, y = (a.ravel() for a in (*bench.x, bench.engine))
    if not np.isfinite(y).all():
        return
    found = np.linalg.lstsq(np.stack([first, second], axis=1), y, rcond=None)[0].tolist()
    for digits in (2, 3, 4, 8):
        a, b = (1.0 if abs(x - 1) < 1e-4 else fits.rounded(x, digits) for x in found)
        if (a, b) != (1.0, 1.0):
            words = f"the hidden state is added {a:.6g} times, the branch {b:.6g} times"
            yield Try([a, b], {"first": a, "second": b}, words, fitted=digits > 4)


def exchanged_gate(bench: Bench) -> Iterator[Try]:
    """The activation of up in place of the gate: at the activation, and at the product with the other one."""
    place, name = (0, "ffn_up") if bench.stage == "ffn_silu" else (1, "ffn_gate")
    rows = bench.value(name)
    if rows is not None:
        yield Try(None, {"x": {place: rows}}, "silu(up)·gate in place of silu(gate)·up")


def on_product(bench: Bench) -> Iterator[Try]:
    """The activation of the product in place of the gate."""
    switches = {"on_product": True}
    if bench.stage == "ffn_swigl":
        gate = bench.value("ffn_gate")
        if gate is None:
            return
        switches = {"gate": gate}
    yield Try(None, switches, "silu(gate·up) in place of silu(gate)·up")


def times(bench: Bench) -> Iterator[Try]:
    """A fitted factor."""
    for factor in fits.factors(bench):
        yield Try(factor, {"times": factor}, f"multiplied by {factor:.6g}")


def part_times(bench: Bench) -> Iterator[Try]:
    """A fitted factor of q, k or v alone: 1/√h where the scale of the scores is folded into q."""
    for part, factor in fits.part_factors(bench):
        yield Try(f"{part} {factor:.6g}", {"parts": {part: factor}}, f"{part} is multiplied by {factor:.6g}")
