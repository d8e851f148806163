"""How hypotheses about the model's two ends are tried: the embedding, and the head with its logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from oracle.bench import Bench
from oracle.case import rows_at
from oracle.engine_tree import Value
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
