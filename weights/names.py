"""THE table of tensors: checkpoint name, place in the parameter pytree, shape, and which models have it.

A matrix is stored as Hugging Face stores it, [out, in], and nothing is transposed, folded or fused on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weights.config import Config


@dataclass(frozen=True)
class TensorRow:
    """One row: `name` in the checkpoint (`{layer}` filled in), `field` in `Layer` or `Params`, `axes` by dimension key.

    `when` names a boolean of `Config`, or one of its layers, without which the tensor does not exist; a leading `!`
    negates it. An axis is a product of letters of the dimension key and of digits: `2M`.
    """

    name: str
    field: str
    axes: tuple[str, ...]
    when: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.name

    def applies(self, config: Config, layer: int) -> bool:
        """Whether this architecture has the tensor, at this layer if it is a layer's."""
        if not self.when:
            return True
        fact = getattr(config, self.when.lstrip("!"))
        return bool(fact(layer) if callable(fact) else fact) != self.when.startswith("!")

    def shape(self, config: Config) -> tuple[int, ...]:
        """The shape in numbers: each axis is a product of letters of the dimension key."""
        dims = config.dims()
        sizes = []
        for axis in self.axes:
            size = 1
            for letter in axis:
                size *= int(letter) if letter.isdigit() else dims[letter]
            sizes.append(size)
        return tuple(sizes)


_LAYER = "model.layers.{layer}."

TENSORS: tuple[TensorRow, ...] = (
    TensorRow("model.embed_tokens.weight", "embed_tokens", ("V", "D")),
    TensorRow(_LAYER + "input_layernorm.weight", "input_layernorm", ("D",)),
    TensorRow(_LAYER + "self_attn.q_proj.weight", "q_proj", ("Hh", "D")),
    TensorRow(_LAYER + "self_attn.k_proj.weight", "k_proj", ("Kh", "D")),
    TensorRow(_LAYER + "self_attn.v_proj.weight", "v_proj", ("Kh", "D")),
    TensorRow(_LAYER + "self_attn.q_proj.bias", "q_bias", ("Hh",), "qkv_bias"),
    TensorRow(_LAYER + "self_attn.k_proj.bias", "k_bias", ("Kh",), "qkv_bias"),
    TensorRow(_LAYER + "self_attn.v_proj.bias", "v_bias", ("Kh",), "qkv_bias"),
    TensorRow(_LAYER + "self_attn.q_norm.weight", "q_norm", ("h",), "qk_norm"),
    TensorRow(_LAYER + "self_attn.k_norm.weight", "k_norm", ("h",), "qk_norm"),
    TensorRow(_LAYER + "self_attn.o_proj.weight", "o_proj", ("D", "Hh")),
    TensorRow(_LAYER + "post_attention_layernorm.weight", "post_attention_layernorm", ("D",)),
    TensorRow(_LAYER + "mlp.gate_proj.weight", "gate_proj", ("F", "D"), "!is_moe"),
    TensorRow(_LAYER + "mlp.up_proj.weight", "up_proj", ("F", "D"), "!is_moe"),
    TensorRow(_LAYER + "mlp.down_proj.weight", "down_proj", ("D", "F"), "!is_moe"),
    TensorRow(_LAYER + "mlp.gate.weight", "router", ("E", "D"), "is_moe"),
    TensorRow("model.norm.weight", "norm", ("D",)),
    TensorRow("lm_head.weight", "lm_head", ("V", "D"), "!tie_word_embeddings"),
)


# The experts of one layer, fields of `Expert`: one tensor each, as published,
EXPERTS: tuple[TensorRow, ...] = (
    TensorRow(_LAYER + "mlp.experts.{expert}.gate_proj.weight", "gate_proj", ("M", "D"), "is_moe"),
    TensorRow(_LAYER + "mlp.experts.{expert}.up_proj.weight", "up_proj", ("M", "D"), "is_moe"),
    TensorRow(_LAYER + "mlp.experts.{expert}.down_proj.weight", "down_proj", ("D", "M"), "is_moe"),
)
# or stacked, as transformers 5 saves them; gate and up lie one after the other.
STACKED: tuple[TensorRow, ...] = (
    TensorRow(_LAYER + "mlp.experts.gate_up_proj", "gate_up_proj", ("E", "2M", "D"), "is_moe"),
    TensorRow(_LAYER + "mlp.experts.down_proj", "down_proj", ("E", "D", "M"), "is_moe"),
)


def layer_rows(config: Config, layer: int) -> list[TensorRow]:
    """The rows that one layer has, without its experts."""
    return [row for row in TENSORS if row.per_layer and row.applies(config, layer)]


def model_rows(config: Config) -> list[TensorRow]:
    """The rows of the whole model."""
    return [row for row in TENSORS if not row.per_layer and row.applies(config, 0)]


def model_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of the whole model with their shapes."""
    return {row.name: row.shape(config) for row in model_rows(config)}


def layer_shapes(config: Config, layer: int, *, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer with their shapes, its experts included, `stacked` or one by one."""
    found = {row.name.format(layer=layer): row.shape(config) for row in layer_rows(config, layer)}
    if stacked and config.is_moe(layer):
        found |= {row.name.format(layer=layer): row.shape(config) for row in STACKED}
    elif config.is_moe(layer):
        shapes = [(row.name, row.shape(config)) for row in EXPERTS]
        for expert in range(config.num_experts):
            found |= {name.format(layer=layer, expert=expert): shape for name, shape in shapes}
    return found


def expected(config: Config, *, stacked: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor a checkpoint of this config holds, with its shape, in the table's order, layer by layer."""
    yield from model_shapes(config).items()
    for layer in range(config.num_hidden_layers):
        yield from layer_shapes(config, layer, stacked=stacked).items()
