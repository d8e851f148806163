"""Hypotheses about whose rows a stage writes or adds: those of the token before, of one token for all, of any."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxref.stages import HIDDEN, STAGES, inputs_of
from oracle.bench import Bench
from oracle.case import INDICES
from oracle.tries import Try

# Fewer rows make no order.
LEAST = 3
# So many columns of a row say whose it is; whether it fits, all of them.
COLUMNS = 256
# So many tokens with other rows are listed.
LISTED = 4
# The stages with one row for each token; inside an expert they are those of the tokens that chose it.
BY_TOKEN = tuple(name for name, row in STAGES.items() if len(row.axes) == 2 and name not in ("embedding", INDICES))
SUMS = ("post_attn_residual", "post_ffn_residual")


def moved(bench: Bench) -> Iterator[Try]:
    """The right rows at the places of other tokens; of a sum also those of one part."""
    if not bench.shown or len(bench.engine) < LEAST or not np.isfinite(bench.engine).all():
        return
    right, tokens = bench.run({}), bench.case.positions
    if right.shape != bench.engine.shape:
        return
    if (words := _told(owners := _owners(right, bench.engine), tokens)) is not None:
        yield Try(_brief(owners, tokens), {"owners": owners}, words)
    for place, key in enumerate(inputs_of(bench.row, bench.config, bench.layer) if bench.stage in SUMS else ()):
        part, name = bench.x[place], HIDDEN if bench.row.inputs[place] == HIDDEN else key[1]
        owners = _owners(part, bench.engine - bench.x[1 - place])
        if (words := _told(owners, tokens)) is not None:
            yield Try(f"{name} {_brief(owners, tokens)}", {"x": {place: part[owners]}}, f"of {name}, {words}")


def _owners(right: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each of `rows` [S, I] the place of the nearest right one; its own where none is nearer."""
    a, b = rows[:, :COLUMNS], right[:, :COLUMNS]
    apart = np.square(b).sum(axis=1) - 2 * a @ b.T
    own, size = np.diagonal(apart), np.square(b).sum(axis=1).max(initial=0)
    return np.where(own <= apart.min(axis=1) + 1e-9 * size, np.arange(len(rows)), apart.argmin(axis=1))


def _step(owners: np.ndarray) -> int | None:
    """By how many places all rows but those at an end stand before their own; None where it is not one number."""
    count = len(owners)
    for step in (1, -1):
        at = np.arange(count) - step
        inside = (at >= 0) & (at < count)
        if (owners[inside] == at[inside]).all():
            return step
    return None


def _brief(owners: np.ndarray, tokens: tuple[int, ...]) -> str:
    """The order in a word."""
    if (owners == owners[0]).all():
        return f"all {tokens[owners[0]]}"
    if (step := _step(owners)) is not None:
        return f"{step:+d}"
    return "reversed" if (owners == np.arange(len(owners))[::-1]).all() else "other"


def _told(owners: np.ndarray, tokens: tuple[int, ...]) -> str | None:
    """The order in a person's words; None where each row stands at its place."""
    elsewhere = np.flatnonzero(owners != np.arange(len(owners)))
    if not elsewhere.size:
        return None
    brief = _brief(owners, tokens)
    if brief.startswith("all"):
        return f"every token has the row of token {tokens[owners[0]]}"
    if (step := _step(owners)) is not None:
        return f"each token has the row of the one {'before' if step > 0 else 'after'} it"
    if brief == "reversed":
        return "the tokens' rows stand in reversed order"
    listed = ", ".join(f"{tokens[at]} has that of {tokens[owners[at]]}" for at in elsewhere[:LISTED])
    more = f" and {len(elsewhere) - LISTED} more" if len(elsewhere) > LISTED else ""
    return f"tokens have the rows of others: {listed}{more}"
