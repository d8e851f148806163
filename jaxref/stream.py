"""A checkpoint run layer by layer: read, compute, hand on, forget, with the next layer read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxref.mesh import to_host
from jaxref.model import decoder_layer
from jaxref.pieces import Piece, Pieces, Place, Routing
from jaxref.precision import Device, Numerics
from jaxref.reader import Reader, Warn, warn_on_stderr
from jaxref.selection import Selection
from jaxref.stages import STAGES
from weights import Checkpoint


def stream(
    checkpoint: Checkpoint,
    tokens: list[int],
    selection: Selection,
    numerics: Numerics,
    device: Device | Mesh | None = None,
    *,
    warn: Warn = warn_on_stderr,
    progress: Callable[[int], None] = lambda layer: None,
    as_stored: bool = False,
    read_ahead: bool = True,
) -> Generator[tuple[int | None, Piece], None, None]:
    """`trace` of a checkpoint whose parameters are read on the way: at most two layers are in memory."""
    with Reader(checkpoint, numerics, device, warn, as_stored=as_stored, read_ahead=read_ahead) as reader:
        yield from trace(reader, tokens, selection, progress)


def trace(
    source: Reader, tokens: list[int], selection: Selection, progress: Callable[[int], None] = lambda layer: None
) -> Generator[tuple[int | None, Piece], None, None]:
    """Every stage of a prefill with its layer (None: whole model), in computation order, as it comes to exist.

    Computes as many layers as the selection needs. The head is computed for the selected positions alone, so `lm_head`
    has one row for each of them.
    """
    config, numerics = source.checkpoint.config, source.numerics
    positions = jnp.asarray(np.arange(len(tokens)))  # jnp.arange would be compiled
    rows = selection.rows(STAGES["moe_expert_out"])
    keep = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    hidden = source.embed(tokens)
    yield 0, Piece("embedding", hidden)
    layers = source.layers(selection.depth())
    for index in range(selection.depth()):  # `enumerate` would hold a layer until it has the next
        layer = next(layers)
        place = Place(config, index, numerics)
        routing = Routing(partial(source.experts, index), keep)
        hidden = yield from _at(index, decoder_layer(layer, hidden, positions, place, routing))
        if not source.resident:
            # Dispatch is asynchronous: without a wait here, all layers would be read before one is computed.
            hidden.block_until_ready()
        del layer
        progress(index)
    if selection.wants(None, "final_norm") or selection.wants(None, "lm_head"):
        yield from _head(source, hidden, selection)


def _at(layer: int, pieces: Pieces) -> Generator[tuple[int, Piece], None, Array]:
    """The pieces of a part with their layer; hands on what the part hands on."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        yield layer, piece


def _head(source: Reader, hidden: Array, selection: Selection) -> Iterator[tuple[None, Piece]]:
    """`final_norm` for all positions and `lm_head` for the selected ones."""
    x = source.final_norm(hidden)
    yield None, Piece("final_norm", x)
    if selection.wants(None, "lm_head"):
        rows = selection.rows(STAGES["lm_head"])
        logits = source.logits(x if rows is None else jnp.asarray(to_host(x)[np.asarray(rows)]))
        yield None, Piece("lm_head", logits, selected=True)  # type: ignore[arg-type]
