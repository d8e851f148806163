"""Greedy decoding by the same stages: a prefill, then one position after another against what is remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.model import Past, Piece, Place, Routing, decoder_layer
from jaxref.precision import Device, Numerics
from jaxref.reader import Reader, Warn, warn_on_stderr
from weights import Checkpoint

Watch = Callable[[int | None, Piece], None]


class Step(NamedTuple):
    """A token that was chosen, and the logits [V] it was chosen by."""

    token: int
    logits: np.ndarray


def generate(
    checkpoint: Checkpoint,
    tokens: list[int],
    numerics: Numerics,
    count: int,
    *,
    device: Device | None = None,
    watch: Watch = lambda layer, piece: None,
    warn: Warn = warn_on_stderr,
) -> Iterator[Step]:
    """Yield `count` greedily chosen tokens; of equal logits the lower id wins. Run it inside `numerics.context()`.

    `watch` is shown every stage of the layers on the way; what it does with it changes nothing. The parameters are
    streamed anew for each token, so that any checkpoint fits.
    """
    config = checkpoint.config
    width = len(tokens) + count  # one width for all steps, so that each stage is compiled twice and not `count` times
    pasts = [empty_past(Place(config, layer, numerics), width) for layer in range(config.num_hidden_layers)]
    new, start = list(tokens), 0
    with Reader(checkpoint, numerics, device, warn) as reader:
        for _ in range(count):
            hidden = reader.embed(new)
            watch(0, Piece("embedding", hidden))
            positions = jnp.arange(start, start + len(new))
            for index, layer in enumerate(reader.ahead(partial(reader.layer, i) for i in range(len(pasts)))):
                routing = Routing(partial(reader.experts, index), np.arange(len(new)))
                place = Place(config, index, numerics)
                pieces = list(decoder_layer(layer, hidden, positions, place, routing, pasts[index]))
                pasts[index] = remember(pasts[index], pieces, positions)
                for piece in pieces:
                    watch(index, piece)
                hidden = pieces[-1].value
            logits = np.asarray(reader.logits(reader.final_norm(hidden[-1:])))[0]
            start, new = start + len(new), [int(np.argmax(logits))]
            yield Step(new[0], logits)


def empty_past(place: Place, width: int) -> Past:
    """Room for the keys [width, K·h] and packed projections [width, (H+2K)h] of `width` positions."""
    config, dtype = place.config, place.numerics.compute
    packed = config.q_width + 2 * config.kv_width
    return Past(jnp.zeros((width, config.kv_width), dtype), jnp.zeros((width, packed), dtype))


def remember(past: Past, pieces: list[Piece], positions: Array) -> Past:
    """The past with what a layer has just made of `positions`."""
    made = {piece.stage: piece.value for piece in pieces}
    return past.extended(made["k_post_rope"], made.get("qkv_bias", made["qkv_matmul"]), positions)
