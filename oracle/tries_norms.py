"""Hypotheses about what a norm divides by, and about what its weight meets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oracle.bench import Bench
from oracle.tries import Try
from oracle.tries_rounded import coarser
from oracle.tries_sums import BLOCKS


def sizes(bench: Bench) -> Iterator[Try]:
    """The size of other rows: of the first one, of the first head, or of all together."""
    found = bench.x[0].shape
    if found[0] > 1 and bench.case.positions[0] == 0:
        yield Try("first token", {"sizes": _first_row}, "all tokens are divided by the size of the first one")
        yield Try("all tokens", {"sizes": _over_rows}, "all tokens are divided by the size over all of them")
    if bench.stage in ("q_norm", "k_norm"):
        yield Try("first head", {"sizes": _first_head}, "all heads are divided by the size of the first one")


def _first_row(size: np.ndarray) -> np.ndarray:
    return size[:1]


def _over_rows(size: np.ndarray) -> np.ndarray:
    return size.mean(axis=0, keepdims=True)


def _first_head(size: np.ndarray) -> np.ndarray:
    return size[:, :1]


def counted(bench: Bench) -> Iterator[Try]:
    """The columns after the last whole block left out of the sum of squares."""
    width = bench.x[0].shape[-1]
    for whole in sorted({width - width % block for block in (*BLOCKS, 512, 1024)} - {0, width}):
        yield Try(whole, {"counted": whole}, f"only the first {whole} of {width} columns count for its size")


def unit(bench: Bench) -> Iterator[Try]:
    """The normed value in fewer bits before its weight, as half-precision engines have it."""
    shown = {"shown": bench.engine} if bench.shown else {}
    for name, dtype in coarser(bench).items():
        yield Try(name, {"unit": dtype, **shown}, f"the normed value is rounded to {name} before its weight")
