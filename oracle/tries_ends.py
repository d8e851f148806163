"""How hypotheses about the model's two ends are tried: the embedding, and the head with its logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from oracle.bench import Bench
from oracle.case import rows_at
from oracle.engine_tree import Value
from oracle.fits import rounded
from oracle.tries import Try


def shifted(bench: Bench) -> Iterator[Try]:
    """Rows of the embedding off by one."""
    tokens, size = np.asarray(bench.replay.engine.tokens), bench.config.vocab_size
    for step in (1, -1):
        rows = bench.replay.engine.checkpoint.embedding_rows((tokens[list(bench.case.positions)] + step) % size)
        yield Try(step, {"rows": np.asarray(rows, np.float64)}, f"the row of token id {step:+d} is taken")


def normalised(bench: Bench) -> Iterator[Try]:
    """Probabilities, or their logarithms."""

    def logs(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    yield Try("log_softmax", {"after": logs}, "they are log-probabilities, not logits")
    yield Try("softmax", {"after": lambda x: np.exp(logs(x))}, "they are probabilities, not logits")


def penalised(bench: Bench) -> Iterator[Try]:
    """A repetition penalty (arXiv:1909.05858): the logits of ids in the prompt over it, or times it where negative."""
    tokens, exact = bench.replay.engine.tokens, bench.run({})
    if tokens is None or exact.shape != bench.engine.shape:
        return
    ids = np.unique(tokens)
    with np.errstate(all="ignore"):
        ratio = exact[:, ids] / bench.engine[:, ids]
    ratio = np.where(exact[:, ids] > 0, ratio, 1 / np.where(ratio == 0, np.nan, ratio))
    found = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else 1.0
    for penalty in dict.fromkeys((rounded(found, 2), rounded(found, 3), found)):
        if penalty > 0 and abs(penalty - 1) > 1e-3:
            after = partial(_penalised, ids, penalty)
            yield Try(penalty, {"after": after}, f"the prompt's ids have a repetition penalty of {penalty:.6g}")


def _penalised(ids: np.ndarray, penalty: float, logits: np.ndarray) -> np.ndarray:
    found, own = logits.copy(), logits[:, ids]
    found[:, ids] = np.where(own > 0, own / penalty, own * penalty)
    return found


def rolled(bench: Bench) -> Iterator[Try]:
    """Rows of the head off by one."""
    for step in (1, -1):
        yield Try(
            step, {"after": partial(np.roll, shift=step, axis=-1)}, f"the logits of ids stand at the id {step:+d}"
        )


def position(bench: Bench) -> Iterator[Try]:
    """The logits of another position, where one alone was asked for."""
    found, own = bench.replay.value((None, "final_norm")), bench.case.positions
    if not isinstance(found, Value) or len(own) != 1:
        return
    (stated,) = own
    for p in dict.fromkeys((stated - 1, stated + 1, 0)):
        if p != stated and p in found.positions:
            row = rows_at(found, (p,), "final_norm")
            yield Try(p, {"x": {0: row}}, f"the logits are those of position {p}, not of {stated}")


def tied(bench: Bench) -> Iterator[Try]:
    """The embedding as the head."""
    if not bench.config.tie_word_embeddings:
        words = "the embedding is used as the head, and the model has a head of its own"
        yield Try(None, {"w": {"head": lambda get: get("embed_tokens")}}, words)


def unnormed(bench: Bench) -> Iterator[Try]:
    """The head without the final norm."""
    hidden = bench.value("post_ffn_residual", bench.config.num_hidden_layers - 1)
    if hidden is not None:
        yield Try(None, {"x": {0: hidden}}, "the head reads the hidden state without the final norm")
