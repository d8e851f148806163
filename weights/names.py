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

    `when` names a boolean of `Config` without which the tensor does not exist; a leading `!` negates it.
    """

    name: str
    field: str
    axes: tuple[str, ...]
    when: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.name

    def applies(self, config: Config) -> bool:
        """Whether this architecture has the tensor."""
        return not self.when or bool(getattr(config, self.when.lstrip("!"))) != self.when.startswith("!")

    def shape(self, config: Config) -> tuple[int, ...]:
        """The shape in numbers: each axis is a product of letters of the dimension key."""
        dims = config.dims()
        sizes = []
        for axis in self.axes:
            size = 1
            for letter in axis:
                size *= dims[letter]
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
    TensorRow(_LAYER + "mlp.gate_proj.weight", "gate_proj", ("F", "D")),
    TensorRow(_LAYER + "mlp.up_proj.weight", "up_proj", ("F", "D")),
    TensorRow(_LAYER + "mlp.down_proj.weight", "down_proj", ("D", "F")),
    TensorRow("model.norm.weight", "norm", ("D",)),
    TensorRow("lm_head.weight", "lm_head", ("V", "D"), "!tie_word_embeddings"),
)


def rows(config: Config, *, per_layer: bool) -> list[TensorRow]:
    """The rows that this architecture has, of the layers or of the whole model."""
    return [row for row in TENSORS if row.per_layer == per_layer and row.applies(config)]


def expected(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor a checkpoint of this config holds, with its shape, in the table's order, layer by layer."""
    for row in rows(config, per_layer=False):
        yield row.name, row.shape(config)
    for layer in range(config.num_hidden_layers):
        for row in rows(config, per_layer=True):
            yield row.name.format(layer=layer), row.shape(config)
