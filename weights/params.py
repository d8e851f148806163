"""The parameters as typed pytrees, by the names of the checkpoint, each matrix [out, in]."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import struct

from weights import names
from weights.config import Config

Tensor = Any  # a jax.Array, or a numpy view of the checkpoint's map


@struct.dataclass
class Layer:
    """One decoder layer. None where the architecture has no such tensor."""

    input_layernorm: Tensor  # [D]
    q_proj: Tensor  # [H·h, D]
    k_proj: Tensor  # [K·h, D]
    v_proj: Tensor  # [K·h, D]
    o_proj: Tensor  # [D, H·h]
    post_attention_layernorm: Tensor  # [D]
    gate_proj: Tensor  # [F, D]
    up_proj: Tensor  # [F, D]
    down_proj: Tensor  # [D, F]
    q_bias: Tensor | None = None  # [H·h]
    k_bias: Tensor | None = None  # [K·h]
    v_bias: Tensor | None = None  # [K·h]
    q_norm: Tensor | None = None  # [h]
    k_norm: Tensor | None = None  # [h]


@struct.dataclass
class Params:
    """A whole model. `lm_head` is None where the head is tied to `embed_tokens`."""

    embed_tokens: Tensor  # [V, D]
    layers: tuple[Layer, ...]
    norm: Tensor  # [D]
    lm_head: Tensor | None = None  # [V, D]

    @property
    def head(self) -> Tensor:
        """The output projection [V, D], tied or not."""
        return self.embed_tokens if self.lm_head is None else self.lm_head


def layer_names(config: Config, layer: int) -> Layer:
    """A `Layer` that holds each tensor's checkpoint name in its place."""
    return Layer(**{row.field: row.name.format(layer=layer) for row in names.rows(config, per_layer=True)})


def random_tensors(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Seeded random tensors by checkpoint name, float32, that exercise every part.

    Matrices ~ N(0, 1/in), so activations keep their size; norm weights around 1 and biases around 0, none trivial.
    """
    return {name: random_tensor(name, shape, seed) for name, shape in names.expected(config)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One tensor, a function of its name, shape and seed alone, so that layers can be made one by one."""
    words = [seed, *name.encode()]
    rng = np.random.default_rng(np.random.SeedSequence(words))
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1.0 + 0.2 * values
    if name.endswith("bias"):
        return 0.5 * values
    return values / np.float32(shape[-1] ** 0.5)


def random_params(config: Config, seed: int = 0) -> Params:
    """A whole random model in float32 numpy, for tests and notebooks."""
    tensors = random_tensors(config, seed)

    def pick(per_layer: bool, layer: int = 0) -> dict[str, np.ndarray]:
        return {r.field: tensors[r.name.format(layer=layer)] for r in names.rows(config, per_layer=per_layer)}

    layers = tuple(Layer(**pick(True, i)) for i in range(config.num_hidden_layers))
    return Params(layers=layers, **pick(False))
