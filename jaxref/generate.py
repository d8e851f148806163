"""Greedy decoding by the same stages: a prefill, then one position after another against what is remembered."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.memory import size
from jaxref.model import decoder_layer
from jaxref.pieces import Past, Piece, Place, Routing
from jaxref.precision import Device, Numerics
from jaxref.reader import Reader, Warn, warn_on_stderr
from weights import Checkpoint, Config, UserError

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
) -> Generator[Step, None, None]:
    """Yield `count` greedily chosen tokens; of equal logits the lower id wins. Run it inside `numerics.context()`.

    `watch` is shown every stage of the layers on the way; what it does with it changes nothing. The parameters are
    streamed anew for each token, so that any checkpoint fits. Raises `UserError` where the machine has no room for so
    many positions.
    """
    config = checkpoint.config
    width = len(tokens) + count  # one width for all steps, so that each stage is compiled twice and not `count` times
    _fits(config, width, numerics)
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


def _fits(config: Config, width: int, numerics: Numerics) -> None:
    """Raise `UserError` where what is remembered of `width` positions is more than the machine has."""
    row = config.num_hidden_layers * (config.q_width + 3 * config.kv_width) * numerics.compute.itemsize
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if width * row > machine:
        raise UserError(
            f"{width} positions, prompt and --max-tokens together, take {size(width * row)}; this machine has"
            f" {size(machine)}: at most {machine // row} would fit"
        )


def empty_past(place: Place, width: int) -> Past:
    """Room for the keys [width, K·h] and packed projections [width, (H+2K)h] of `width` positions."""
    config, dtype = place.config, place.numerics.compute
    packed = config.q_width + 2 * config.kv_width
    return Past(jnp.zeros((width, config.kv_width), dtype), jnp.zeros((width, packed), dtype))


def remember(past: Past, pieces: list[Piece], positions: Array) -> Past:
    """The past with what a layer has just made of `positions`."""
    made = {piece.stage: piece.value for piece in pieces}
    return past.extended(made["k_post_rope"], made.get("qkv_bias", made["qkv_matmul"]), positions)
