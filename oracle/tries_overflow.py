"""Hypotheses about numbers that leave a type's range on the way: where they do, NaN, infinity or zero is left."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oracle.bench import Bench
from oracle.tries import Try
from oracle.variants_overflow import RANGES


def powers(bench: Bench) -> Iterator[Try]:
    """Softmax without its greatest score subtracted: eˣ overflows above 88.7 in float32, above 11.1 in float16.

    Where all powers of a row are zero, zeros are divided by zero, at masked keys too where nothing puts a zero there.
    """
    for kind, limit in RANGES.items():
        words = f"the greatest score is not subtracted, and e^x, in {kind}, overflows above {np.log(limit):.1f}"
        for there in (True, False):
            yield Try(kind, {"unshifted": kind, "masked_too": there}, words)


def sigmoid(bench: Bench) -> Iterator[Try]:
    """SiLU as x·eˣ/(1 + eˣ)."""
    for kind, limit in RANGES.items():
        words = f"it is x·e^x/(1 + e^x), and e^x, in {kind}, overflows above {np.log(limit):.1f}"
        yield Try(kind, {"activation": f"silu in {kind}"}, words)


def products(bench: Bench) -> Iterator[Try]:
    """q·k in float16 before it is scaled, as Qwen2's keys are known to overflow it."""
    shown = {"shown": bench.engine} if bench.shown else {}
    yield Try("float16", {"product": "float16", **shown}, "q·k is in float16 before it is scaled by 1/√h")


def squares(bench: Bench) -> Iterator[Try]:
    """The squares of a norm in float16, each alone or with their sum: rows with values above 256 become zero."""
    greatest = np.square(bench.x[0])
    for name, sizes in (("each", greatest), ("sum", greatest.sum(axis=-1))):
        if sizes.max(initial=0.0) > RANGES["float16"]:
            what = "its squares overflow" if name == "each" else "the sum of its squares overflows"
            yield Try(name, {"squares": name}, f"{what} float16, and a row is divided by infinity")
