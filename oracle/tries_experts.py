"""How hypotheses about a mixture of experts are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from oracle.bench import Bench
from oracle.case import INDICES
from oracle.router_rules import rules
from oracle.routing import whole_ids
from oracle.tries import Tries, Try

# Capacity factors that people use (arXiv:2101.03961): tokens an expert takes, by those it would get were all alike.
FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)


def renormalise(wanted: bool) -> Tries:
    """Weights of experts made to sum to one, or not."""

    def tries(bench: Bench) -> Iterator[Try]:
        if bench.settings["renormalise"] is not wanted:
            words = "they are renormalised, norm_topk_prob is false" if wanted else "they are not renormalised"
            yield Try(None, {"renormalise": wanted}, words)

    return tries


def count(bench: Bench) -> Iterator[Try]:
    """As many experts a token as the engine wrote."""
    count = bench.engine.shape[1]
    if count != bench.settings["count"]:
        yield Try(
            count, {"count": count}, f"{count} experts a token (num_experts_per_tok is {bench.settings['count']})"
        )


def chosen(bench: Bench) -> Iterator[Try]:
    """The weights of the experts that known mistakes choose, or of those that it wrote that it chose."""
    if not bench.shown:
        return
    logits, count = bench.x[0], bench.config.num_experts_per_tok
    for rule in rules(logits, count) if np.isfinite(logits).all() else ():
        yield Try(rule.name, {"ids": rule.chosen(count)}, f"they are the weights of {rule.words}")
    written = bench.value(INDICES)
    ids = None if written is None else whole_ids(written, logits.shape[1])
    if ids is not None:
        yield Try("written", {"ids": ids}, f"they are the weights of the experts in {INDICES}")


def lost(bench: Bench) -> Iterator[Try]:
    """One rank left out of the sum."""
    for rank in range(bench.config.num_experts_per_tok):
        yield Try(rank, {"lost": rank}, f"the output of the expert of rank {rank} is not added")


def capacity(bench: Bench) -> Iterator[Try]:
    """Experts that take so many tokens, and drop those that come later."""
    ids = bench.x[2].astype(int)
    if bench.case.positions != tuple(range(len(ids))):
        return
    # [S, A]: how many tokens before each one chose the same expert.
    before = np.cumsum(np.eye(bench.config.num_experts, dtype=int)[ids].sum(axis=1), axis=0)
    turn = np.take_along_axis(before, ids, axis=1)
    shares = {math.ceil(factor * ids.size / bench.config.num_experts) for factor in FACTORS}
    for limit in sorted({*range(1, 17), *shares}):
        if limit < turn.max():
            words = f"an expert takes {limit} tokens, and those that choose it later go without"
            yield Try(limit, {"kept": turn <= limit}, words)


def rolled(bench: Bench) -> Iterator[Try]:
    """The weights of the neighbours' ranks; of two that is the reversed order."""
    for step in (1, -1) if bench.config.num_experts_per_tok > 2 else ():
        yield Try(step, {"rolled": step}, f"the weights are {step:+d} rank off")


def shift_experts(bench: Bench) -> Iterator[Try]:
    """Experts off by one."""
    for shift in (1, -1):
        yield Try(shift, {"shift": shift}, f"the expert with id {shift:+d} is run")


def weighted_input(bench: Bench) -> Iterator[Try]:
    """An expert's weight on what it reads, as in Llama 4, not on what it gives."""
    weights, x = bench.value("moe_router"), bench.x[0]
    if weights is not None and x.ndim == 2:
        rows = x[:, None] * weights[..., None]
        yield Try(None, {"x": {0: rows}}, "it reads its input times the expert's weight, as in Llama 4")
