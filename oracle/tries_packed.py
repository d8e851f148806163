"""Hypotheses about packed weights that an engine unpacks in another way than they were packed in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from oracle.bench import Bench, Get
from oracle.tries import Try
from oracle.tries_rounded import COLUMNS, TELLS, some_columns
from oracle.unpacking import Misreading, misreadings

# Inputs whose numbers share bytes: 32 in Q4_0 and Q5_0, 64 in Q4_K. The first half is in the low bits.
BLOCKS = (32, 64)
ORDERS = {
    "turns": "low and high bits are read in turns, not the low ones of a block first",
    "halves": "the low bits of a block are read first, where low and high ones come in turns",
    "exchanged": "high bits are read for low ones",
}


def nibbles(bench: Bench) -> Iterator[Try]:
    """The halves of each block of inputs in another order, in all matrices of the stage or in some."""
    rows = bench.run({}) if bench.stage == "embedding" else None
    width = (bench.x[0] if rows is None else rows).shape[-1]
    for block in (block for block in BLOCKS if width % block == 0):
        for order, said in ORDERS.items():
            words = f"blocks of {block} weights are unpacked wrongly: {said}"
            if rows is not None:
                yield Try(f"{order} of {block}", {"rows": reordered(rows, block, order)}, words)
                continue
            for fields in _fields(bench):
                which = "" if fields == bench.row.params else f" of {', '.join(fields)}"
                picks = {field: partial(_unpacked, block, order) for field in fields}
                yield Try(f"{order} of {block}{which}", {"w": picks}, f"{words}{which}", together=(block, order))


def _fields(bench: Bench) -> tuple[tuple[str, ...], ...]:
    """All of the stage's; those of q and k or of v alone where one file holds them in different types, as Q4_K_M."""
    fields = bench.row.params
    return (fields, fields[:2], fields[2:]) if len(fields) > 1 else (fields,)


def _unpacked(block: int, order: str, get: Get) -> np.ndarray:
    return reordered(get(), block, order)


def reordered(matrix: np.ndarray, block: int, order: str) -> np.ndarray:
    """The columns of a matrix [·, I], I a multiple of `block`, as an engine has them that unpacks in this order."""
    halves = matrix.reshape(-1, 2, block // 2)
    if order == "turns":
        halves = halves.swapaxes(1, 2)
    elif order == "halves":
        halves = matrix.reshape(-1, block // 2, 2).swapaxes(1, 2)
    else:
        halves = halves[:, ::-1]
    return halves.reshape(matrix.shape)


def misread(bench: Bench) -> Iterator[Try]:
    """Blocks of a GGUF read as its types are not meant: those of one type in all of the stage's matrices alike."""
    if bench.stage == "embedding":
        yield from _embedding(bench)
        return
    fields = bench.row.params
    stored = {field: bench.stored_as(field) for field in fields}
    rows = [(kind, row) for kind in dict.fromkeys(stored.values()) for row in misreadings(kind)]
    plain = some_columns(bench, bench.x[0], lambda field: bench.matrix(field)[:COLUMNS]) if rows else 0.0
    for kind, row in rows:
        which = tuple(field for field in fields if stored[field] == kind)
        if some_columns(bench, bench.x[0], partial(_first_rows, bench, row, which)) <= TELLS * plain:
            picks = {field: partial(_read, row) for field in which}
            where = "" if which == fields else f" of {', '.join(which)}"
            yield Try(f"{kind}: {row.name}", {"w": picks}, f"blocks of {kind}{where}: {row.words}")


def _first_rows(bench: Bench, row: Misreading, which: tuple[str, ...], field: str) -> np.ndarray:
    return row.read(bench.blocks(field, slice(COLUMNS))) if field in which else bench.matrix(field)[:COLUMNS]


def _read(row: Misreading, get: Get) -> np.ndarray:
    return get(read=row.read)


def _embedding(bench: Bench) -> Iterator[Try]:
    kind, tokens = bench.stored_as("embed_tokens"), bench.replay.engine.tokens or []
    for row in misreadings(kind):
        rows = row.read(bench.blocks("embed_tokens", np.asarray(tokens)[list(bench.case.positions)]))
        yield Try(f"{kind}: {row.name}", {"rows": rows}, f"blocks of {kind}: {row.words}")
