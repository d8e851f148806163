"""Products of few rows on an NVIDIA GPU, in Pallas: weights are read once, as they are stored, and widened on the way.

A prompt of some tokens multiplies each weight some times, so that reading the weights is all that should count. cuBLAS
reads float32 weights at a third of the memory's speed there, and would need bfloat16 ones widened in memory before.

Dimension key: S rows, I input width, O output width.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

MOST_ROWS = 8  # a thread holds the sums of all rows in its registers
OUTPUTS = ((1024, 4), (0, 2))  # from how many outputs on a warp takes how many of them at a time
LANES = 128  # inputs that a warp takes at a time: four a thread
ENOUGH_WARPS = 1024  # else several warps share the inputs of a block of outputs
AHEAD = 8  # bytes of each weight's place that are on their way: four steps of bfloat16, two of float32
INDEXABLE = 1 << 31  # the kernel counts in 32 bits
OLDEST = 8  # the compute capability, Ampere's, below which Triton compiles nothing


def runs_on(gpu: Any) -> bool:
    """Whether a GPU is new enough. JAX says "9.0" of an NVIDIA card, and other words of others."""
    major = str(getattr(gpu, "compute_capability", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= OLDEST


def fits(x: Array, weight: Array) -> bool:
    """Whether the kernel takes such operands: few rows, and a weight that it can count through.

    Pallas's way to Triton is to be removed from some later JAX, where the products would be cuBLAS's again.
    """
    few = x.ndim == weight.ndim == 2 and x.shape[0] <= MOST_ROWS and weight.size < INDEXABLE
    return few and find_spec("jax.experimental.pallas.triton") is not None


class Tiles(NamedTuple):
    """Outputs that a block makes, warps that share its inputs, and steps of weights that are on their way."""

    block: int
    warps: int
    ahead: int


@partial(jax.jit, static_argnames=("interpret",))
def product(x: Float[Array, "S I"], weight: Float[Array, "O I"], *, interpret: bool = False) -> Float[Array, "S O"]:
    """x · Wᵀ in the dtype of `x`, float32 or float64, for S ≤ 8; weights of fewer bits are widened, which is exact.

    Each thread sums every 32nd group of four inputs, then the threads' sums are added in pairs: always in the same
    order, and nearer to the truth than one long sum. `interpret` runs it on a CPU, for tests.
    """
    return tiled(x, weight, tiles_for(weight.shape[0], x.dtype.itemsize, weight.dtype.itemsize), interpret=interpret)


def tiles_for(outputs: int, summed: int, stored: int) -> Tiles:
    """The tiles of a product, from its outputs and from the bytes of its sums and weights.

    Sums of 8 bytes take twice the registers, so that a block makes half as many of them.
    """
    block = next(block for least, block in OUTPUTS if outputs >= least) * 4 // summed
    blocks = -(-outputs // block)
    warps = next(warps for warps in (1, 2, 4, 8) if warps == 8 or blocks * warps >= ENOUGH_WARPS)
    return Tiles(block, warps, max(1, AHEAD // stored))


@partial(jax.jit, static_argnames=("tiles", "interpret"))
def tiled(
    x: Float[Array, "S I"], weight: Float[Array, "O I"], tiles: Tiles, *, interpret: bool = False
) -> Float[Array, "S O"]:
    """`product` in these tiles, which decide the order of its sums."""
    # Not above: importing it takes longer than a dump on a CPU, which never needs it, may.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, outputs = x.shape[0], weight.shape[0]
    return pl.pallas_call(
        partial(_sum_block, block=tiles.block, lanes=LANES * tiles.warps, ahead=tiles.ahead),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        grid=(pl.cdiv(outputs, tiles.block),),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
    )(x, weight)


def _sum_block(x: Any, weight: Any, out: Any, *, block: int, lanes: int, ahead: int) -> None:
    """`block` outputs of all rows, `lanes` inputs at a time, with the weights of the next steps on their way."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (count, width), outputs = x.shape, weight.shape[0]
    # Past the last output, the last one is made again: the same value twice in the same place.
    places = [jnp.minimum(pl.program_id(0) * block + i, outputs - 1) for i in range(block)]
    lane = jnp.arange(lanes, dtype=jnp.int32)

    def take(matrix: Any, row: Any, step: Any, policy: str | None = None) -> Array:
        inside = step * lanes + lane < width
        place = matrix.at[row, pl.ds(step * lanes, lanes)]
        return triton.load(place, mask=inside, other=0.0, eviction_policy=policy)

    def weights(step: Any) -> list[Array]:
        # Each is used once, while the inputs should stay in the cache.
        return [take(weight, place, step, "evict_first") for place in places]

    def add(step: Any, sums: Any, now: list[Array]) -> Any:
        inputs = [take(x, jnp.int32(row), step) for row in range(count)]
        wide = [w.astype(out.dtype) for w in now]
        pairs = zip(sums, inputs, strict=True)
        return [[total + w * row for total, w in zip(totals, wide, strict=True)] for totals, row in pairs]

    def several(number: Any, carry: Any) -> Any:
        # As many steps as are ahead, so that weights stay in the registers that they are read into: to move one that is
        # still on its way would be to wait for it.
        sums, coming = carry
        for turn in range(ahead):
            step = number * ahead + turn
            sums = add(step, sums, coming[turn])
            coming = [*coming[:turn], weights(step + ahead), *coming[turn + 1 :]]
        return sums, coming

    zeros = [[jnp.zeros(lanes, out.dtype) for _ in places] for _ in range(count)]
    coming = [weights(jnp.int32(step)) for step in range(ahead)]
    turns = jnp.int32(pl.cdiv(width, lanes * ahead))
    sums, _ = lax.fori_loop(jnp.int32(0), turns, several, (zeros, coming))
    for row, each in enumerate(sums):
        for place, total in zip(places, each, strict=True):
            triton.store(out.at[jnp.int32(row), place], jnp.sum(total))
