"""What an engine does to activations before it multiplies them with weights that are not float32.

ggml's CPU kernels round each row of activations to the type that the weight's dot product takes (`vec_dot_type` in
ggml-cpu.c): int8 in blocks for quantised weights, float16 or bfloat16 for such weights. The sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from weights import Checkpoint
from weights.names import expected

# How a weight is stored in a GGUF file -> what becomes of its activations; float32 weights leave them alone.
ACTIVATIONS: dict[str, str] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "MXFP4"), "Q8_0"),
    # Q8_1: the same, and the sum of each block in float16, which meets the least values; that rounding is left out.
    **dict.fromkeys(("Q4_1", "Q5_1"), "Q8_0"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "Q8_K"),
    "F16": "float16",
    "BF16": "bfloat16",
}
# From fine to coarse: what a whole model's engine is called by.
COARSENESS = {"float16": "float16", "bfloat16": "bfloat16", "Q8_K": "q8", "Q8_0": "q8"}
BLOCKS = {"Q8_0": 32, "Q8_K": 256}


@partial(register_dataclass, data_fields=["values"], meta_fields=["activation"])
@dataclass(frozen=True)
class Weight:
    """A matrix [out, in] that wants its activations rounded to `activation` before they meet it."""

    values: Array
    activation: str


Matrix = Array | Weight


def activation_of(checkpoint: Checkpoint, name: str) -> str | None:
    """What a GGUF engine rounds activations to before this tensor (by Hugging Face's name); None: they stay."""
    return ACTIVATIONS.get(checkpoint.stored_as(name)) if checkpoint.folder.suffix == ".gguf" else None


def coarsest_activation(checkpoint: Checkpoint) -> str:
    """The coarsest rounding of activations that a GGUF's weights ask for: float32, float16, bfloat16 or q8."""
    names = [name for name, shape in expected(checkpoint.config, stacked=checkpoint.stacked) if len(shape) > 1]
    used = [name for name in names if name != "model.embed_tokens.weight" or name == checkpoint.head_name]
    kinds = {activation_of(checkpoint, name) for name in used}
    return next((COARSENESS[kind] for kind in reversed(COARSENESS) if kind in kinds), "float32")


def round_activations(x: Float[Array, "*S I"], kind: str) -> Float[Array, "*S I"]:
    """Rows as an engine rounds them: "Q8_0" (blocks of 32, a float16 scale), "Q8_K" (256, float32), or half precision.

    A row whose length is no multiple of the block is padded with zeros.
    """
    if kind not in BLOCKS:
        return x.astype(kind).astype(x.dtype)
    block = BLOCKS[kind]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    blocks = padded.reshape(-1, block)
    rounded = (_q8_0 if kind == "Q8_0" else _q8_k)(blocks).reshape(padded.shape)
    return rounded[..., : x.shape[-1]].astype(x.dtype)


def _q8_0(blocks: Array) -> Array:
    """`quantize_row_q8_0` as the processors' own versions of it compute (ggml-cpu/arch): exact halves are not rare."""
    greatest = jnp.abs(blocks).max(axis=1, keepdims=True)
    whole = jnp.round(blocks * jnp.where(greatest == 0, 0, 127 / greatest))
    return whole * (greatest / 127).astype(jnp.float16).astype(jnp.float32)


def _q8_k(blocks: Array) -> Array:
    """`quantize_row_q8_K` of ggml-quants.c: the value of greatest magnitude becomes -127."""
    place = jnp.abs(blocks).argmax(axis=1)[:, None]
    scale = jnp.take_along_axis(blocks, place, axis=1) / -127
    return jnp.minimum(jnp.round(blocks * jnp.where(scale == 0, 0, 1 / scale)), 127) * scale
