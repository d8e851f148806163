"""How hypotheses about a mixture of experts are tried."""

from __future__ import annotations

from collections.abc import Iterator

from oracle.bench import Bench
from oracle.tries import Tries, Try


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


def lost(bench: Bench) -> Iterator[Try]:
    """One rank left out of the sum."""
    for rank in range(bench.config.num_experts_per_tok):
        yield Try(rank, {"lost": rank}, f"the output of the expert of rank {rank} is not added")


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
