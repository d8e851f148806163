"""A Qwen2 / Qwen3 / Qwen3-MoE forward in PyTorch that keeps every stage and computes what it is told to get wrong."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.oracle.standin.attention import attend
from tests.oracle.standin.feedforward import feed_forward
from tests.oracle.standin.norms import rms_norm
from tests.oracle.standin.place import Place, Run, Trace

EMBEDDING = "model.embed_tokens.weight"


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: on matrices this small a second one is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    tokens: list[int],
    dtype: str = "float32",
    faults: Mapping[str, Container[int] | None] | None = None,
) -> Trace:
    """Every stage, all positions, float32, by (layer, stage); `config` is config.json, `weights` its tensors by name.

    `faults` says in which layers each is planted (None: wherever it can be). Raises `ValueError` for one that is
    planted where it changes nothing that is computed, a misspelt one too.
    """
    state = Run(config, weights, getattr(torch, dtype), faults or {}, tokens)
    with torch.no_grad(), one_thread():
        hidden = _embed(Place(state, 0), tokens)
        for layer in range(config["num_hidden_layers"]):
            hidden = _layer(Place(state, layer), hidden)
        _head(Place(state, None), hidden)
    if idle := set(state.faults) - state.struck:
        raise ValueError(f"planted where nothing computes it: {', '.join(sorted(idle))}")
    return state.trace


def _embed(here: Place, tokens: list[int]) -> Tensor:
    ids = torch.tensor(tokens)
    if here.fault("embedding_shifted"):
        ids = (ids + 1) % here.config["vocab_size"]
    if here.fault("embedding_tokens"):
        ids = torch.tensor([*tokens[:2], 7, *tokens[3:-1], 9])
    rows = here.weight(EMBEDDING)[ids]
    factor = here.argument("embedding_scaled")
    if factor == "sqrt_d":
        rows = rows * here.config["hidden_size"] ** 0.5
    elif factor:
        rows = rows * float(factor)
    return here.emit("embedding", rows)


def _layer(here: Place, hidden: Tensor) -> Tensor:
    normed = here.emit("attn_norm", rms_norm(here, "attn_norm", hidden))
    hidden = _add(here, "post_attn_residual", hidden, normed, attend(here, normed))
    normed = here.emit("ffn_norm", rms_norm(here, "ffn_norm", hidden))
    return _add(here, "post_ffn_residual", hidden, normed, feed_forward(here, normed))


def _add(here: Place, stage: str, hidden: Tensor, normed: Tensor, branch: Tensor) -> Tensor:
    """The hidden state with a branch added."""
    hidden, branch = here.read(stage, hidden), here.read(f"{stage}.second", branch)
    if here.fault(f"rows_moved/{stage}.first/+1"):
        hidden = hidden.roll(1, 0)
    if order := here.argument(f"rows_moved/{stage}.second"):
        branch = branch.flip(0) if order == "reversed" else branch[:1].expand_as(branch)
    total = hidden + branch
    if factor := here.argument(f"residual_scaled/{stage}"):
        total = hidden + here.round(branch.float() * float(factor))
    if here.fault(f"residual_missing/{stage}"):
        total = branch
    if here.fault(f"residual_doubled/{stage}"):
        total = hidden + total
    if here.fault(f"residual_doubled/{stage}/branch"):
        total = total + branch
    if here.fault(f"residual_normed/{stage}"):
        total = normed + branch
    return here.emit(stage, total)


def _head(here: Place, hidden: Tensor) -> None:
    normed = hidden if here.fault("final_norm_missing") else rms_norm(here, "final_norm", hidden)
    normed = here.emit("final_norm", normed)
    if here.fault("final_norm_missing/lm_head"):
        normed = hidden
    tied = here.config.get("tie_word_embeddings") or here.fault("head_tied")
    logits = here.linear(normed, EMBEDDING if tied else "lm_head.weight")
    if factor := here.argument("logits_scaled"):
        logits = logits * float(factor)
    if limit := here.argument("logits_capped"):
        logits = here.round(float(limit) * (logits.float() / float(limit)).tanh())
    if here.fault("logits_normalised"):
        logits = here.round(logits.float().log_softmax(-1))
    if penalty := here.argument("logits_penalised"):
        own = logits[:, here.run.tokens].float()
        logits = logits.clone()
        logits[:, here.run.tokens] = here.round(torch.where(own > 0, own / float(penalty), own * float(penalty)))
    here.emit("lm_head", logits.roll(1, -1) if here.fault("logits_rolled") else logits)
