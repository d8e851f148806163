"""The parameters as typed pytrees, by the names of the checkpoint, each matrix [out, in]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from jax.tree_util import register_dataclass, register_static

from weights import names
from weights.config import Config

# Here and not where it is written: a command that needs no JAX must not wait for its import.
register_static(Config)

Tensor = Any  # a jax.Array, or a numpy view of the checkpoint's map


class _Pytree:
    """What a frozen dataclass of tensors has beside being a pytree (`flax.struct` would cost 0.1 s of every import)."""

    def replace(self, **fields: Any) -> Self:
        """The same with other fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


@register_dataclass
@dataclass(frozen=True)
class Expert(_Pytree):
    """One expert, or all of a layer's with a leading axis E."""

    gate_proj: Tensor  # [M, D]
    up_proj: Tensor  # [M, D]
    down_proj: Tensor  # [D, M]


@register_dataclass
@dataclass(frozen=True)
class Layer(_Pytree):
    """One decoder layer. None where the architecture has no such tensor, `experts` where they are read singly."""

    input_layernorm: Tensor  # [D]
    q_proj: Tensor  # [H·h, D]
    k_proj: Tensor  # [K·h, D]
    v_proj: Tensor  # [K·h, D]
    o_proj: Tensor  # [D, H·h]
    post_attention_layernorm: Tensor  # [D]
    gate_proj: Tensor | None = None  # [F, D]
    up_proj: Tensor | None = None  # [F, D]
    down_proj: Tensor | None = None  # [D, F]
    q_bias: Tensor | None = None  # [H·h]
    k_bias: Tensor | None = None  # [K·h]
    v_bias: Tensor | None = None  # [K·h]
    q_norm: Tensor | None = None  # [h]
    k_norm: Tensor | None = None  # [h]
    router: Tensor | None = None  # [E, D]
    experts: Expert | None = None  # [E, …]


@register_dataclass
@dataclass(frozen=True)
class Params(_Pytree):
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
    found: dict[str, Any] = {row.field: row.name.format(layer=layer) for row in names.layer_rows(config, layer)}
    return Layer(**found)


def expert_names(layer: int, expert: int) -> Expert:
    """An `Expert` that holds each tensor's published name in its place."""
    return Expert(**{row.field: row.name.format(layer=layer, expert=expert) for row in names.EXPERTS})


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

    def expert(layer: int, index: int) -> Expert:
        return jax.tree.map(tensors.__getitem__, expert_names(layer, index))

    return whole_params(config, tensors.__getitem__, expert)


def whole_params(config: Config, tensor: Callable[[str], np.ndarray], expert: Callable[[int, int], Expert]) -> Params:
    """A whole model out of `tensor(name)` and `expert(layer, index)`; the experts of a layer are stacked."""

    def layer(index: int) -> Layer:
        plain = jax.tree.map(tensor, layer_names(config, index))
        if not config.is_moe(index):
            return plain
        experts = [expert(index, e) for e in range(config.num_experts)]
        return plain.replace(experts=jax.tree.map(lambda *each: np.stack(each), *experts))

    whole = {row.field: tensor(row.name) for row in names.model_rows(config)}
    return Params(layers=tuple(layer(i) for i in range(config.num_hidden_layers)), **whole)
