"""How each hypothesis is tried: its variants for one stage, with the parameters that they find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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


def eps(bench: Bench) -> Iterator[Try]:
    """Another eps: those that people use, and a fitted one."""
    for eps in fits.epsilons(bench):
        words = f"eps = {eps:g} (the config says {bench.settings['eps']:g})"
        yield Try(eps, {"eps": eps}, words, fitted=eps not in fits.EPSILONS)


def other_norm(bench: Bench) -> Iterator[Try]:
    """The weight of the layer's other norm, or of the other head norm."""
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
        for field in bench.row.params:
            if bench.has(field, layer):
                pick: Pick = lambda get, field=field, layer=layer: get(field, layer)  # noqa: E731
                words = f"{field} of layer {layer} in place of layer {bench.layer}"
                yield Try(field, {"w": {field: pick}}, words, together=layer)


# --- projections


def order(bench: Bench) -> Iterator[Try]:
    """The matrices of q, k and v in another order, where their shapes allow it."""
    for order in ("qvk", "kqv", "kvq", "vqk", "vkq"):
        yield Try(order, {"order": order}, f"q, k and v are computed with the matrices of {', '.join(order)}")


def bias(bench: Bench, times: int) -> Iterator[Try]:
    """The bias of some parts, added `times` times."""
    for parts in ("qkv", "q", "k", "v", "qk", "qv"):
        how = {0: "missing", 2: "added twice", -1: "subtracted"}[times]
        words = f"the bias of {', '.join(parts)} is {how}"
        yield Try(parts, {"times": dict.fromkeys(parts, times)}, words)


def transposed(bench: Bench) -> Iterator[Try]:
    """The buffer of a matrix read as [in, out]."""
    for field in bench.row.params:
        pick: Pick = lambda get, field=field: (m := get(field)).reshape(m.shape[::-1]).T  # noqa: E731
        yield Try(field, {"w": {field: pick}}, f"{field} is read as [in, out], its rows as columns")


def bits(bench: Bench) -> Iterator[Try]:
    """The bfloat16 values of a matrix read as float16."""

    def misread(matrix: np.ndarray) -> np.ndarray:
        bits = matrix.astype(np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)

    for field in bench.row.params:
        pick: Pick = lambda get, field=field: misread(get(field))  # noqa: E731
        yield Try(field, {"w": {field: pick}}, f"the bfloat16 values of {field} are read as float16")


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


# --- embedding, head


def times(bench: Bench) -> Iterator[Try]:
    """A fitted factor."""
    for factor in fits.factors(bench):
        yield Try(factor, {"times": factor}, f"multiplied by {factor:.6g}")


def shifted(bench: Bench) -> Iterator[Try]:
    """Rows of the embedding off by one."""
    tokens, size = np.asarray(bench.replay.engine.tokens), bench.config.vocab_size
    for step in (1, -1):
        rows = bench.replay.engine.checkpoint.embedding_rows((tokens[list(bench.case.positions)] + step) % size)
        yield Try(step, {"rows": np.asarray(rows, np.float64)}, f"the row of token id {step:+d} is taken")


def tied(bench: Bench) -> Iterator[Try]:
    """The embedding as the head."""
    if not bench.config.tie_word_embeddings:
        words = "the embedding is used as the head, and the model has a head of its own"
        yield Try(None, {"w": {"head": lambda get: get("embed_tokens")}}, words)


def unnormed(bench: Bench) -> Iterator[Try]:
    """The head without the final norm."""
    hidden = bench.value("post_ffn_residual", bench.config.num_hidden_layers - 1)
    if hidden is not None:
        yield Try(None, {"x": {0: hidden}}, "the head reads the hidden state without the final norm")
