"""Hypotheses about what a stage reads: another tensor in place of its own, or token ids that are not the prompt's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxref.stages import HIDDEN, STAGES, Key, inputs_of
from oracle.bench import Bench
from oracle.case import INDICES, WHOLE
from oracle.engine_tree import Value
from oracle.tries import Try
from oracle.tries_rows import SUMS

# What other rows of the table say by a name of their own.
_NAMED = {
    ("lm_head", "post_ffn_residual"),
    ("post_attn_residual", "attn_norm"),
    ("post_ffn_residual", "ffn_norm"),
    ("ffn_silu", "ffn_up"),
    ("ffn_swigl", "ffn_gate"),
}
# These read nothing of their own layer: what the layer before wrote could be in its place.
_FIRST = ("attn_norm", "final_norm", "lm_head")
_LATE = ("attn_out", "post_attn_residual", "ffn_norm", "ffn_out", "moe_ffn_out", "post_ffn_residual")
_PACKED = ("qkv_matmul", "qkv_bias")
# Rows of the embedding that are compared at once.
_ROWS = 8192


def other(bench: Bench) -> Iterator[Try]:
    """Every other tensor before the stage in place of each input that fits: of q, k and v the parts."""
    for place, own in enumerate(inputs_of(bench.row, bench.config, bench.layer)):
        if isinstance(own, str) or own[1] == INDICES or (bench.x[place].ndim > 2 and bench.stage == "attention"):
            continue
        part = "start" in bench.settings and own[1] in _PACKED
        name = _own_part(bench, own[1]) if part else own[1]
        for words, rows in _tensors(bench, own, place):
            if words == name or _is_named(bench.stage, place, words):
                continue
            switches = {"x": {place: rows}, **({"start": 0} if "start" in bench.settings else {})}
            if rows.shape[1:] == (_width(bench),) if part else rows.shape == bench.x[place].shape:
                yield Try(words, switches, f"it reads {words} in place of {name}")


def _is_named(stage: str, place: int, words: str) -> bool:
    # Of a sum each of the two has its own meaning; of gate and up the second alone.
    first = 1 if stage == "ffn_swigl" else 0
    return (stage, words) in _NAMED and place == first


def _width(bench: Bench) -> int:
    """Columns of the part of a packed row that this stage reads."""
    s = bench.settings
    return int(s.get("heads", s.get("kv_heads", 0)) * bench.config.head_dim)


def _own_part(bench: Bench, packed: str) -> str:
    return f"{'v' if bench.stage == 'attention' else bench.stage[0]} of {packed}"


def _tensors(bench: Bench, own: Key, place: int) -> Iterator[tuple[str, np.ndarray]]:
    """What the engine had written when it came to this stage, by name; packed rows as a whole and by parts."""
    whole = (bench.stage, place) in WHOLE
    for name, key in _before(bench):
        found = bench.replay.value(key) if key != own or key[1] in _PACKED else None
        if not isinstance(found, Value) or found.array.ndim != bench.x[place].ndim:
            continue
        rows = found.array if whole and len(found.positions) == bench.replay.engine.count else None
        rows = bench.value(key[1], key[0]) if rows is None and not whole else rows
        if rows is None:
            continue
        yield name, rows
        if key[1] in _PACKED:
            config = bench.config
            ends = [config.q_width, config.q_width + config.kv_width]
            for part, values in zip("qkv", np.split(rows, ends, axis=1), strict=True):
                yield f"{part} of {name}", values


def _before(bench: Bench) -> Iterator[tuple[str, Key]]:
    """The tensors of this layer before the stage, the hidden state that came in, and of a sum the embedding."""
    layer, config = bench.layer, bench.config
    last = (config.num_hidden_layers if layer is None else layer) - 1
    hidden = (last, "post_ffn_residual") if last >= 0 else (0, "embedding")
    yield HIDDEN, hidden
    if last >= 0 and bench.stage in SUMS:
        yield "embedding", (0, "embedding")
    if bench.stage in _FIRST and last >= 0:
        yield from (
            (f"{name} of the layer before", (last, name)) for name in _LATE if STAGES[name].exists(config, last)
        )
        return
    names = list(STAGES)
    for name in reversed(names[: names.index(bench.stage)]):  # of those that come to the same the nearest
        stage = STAGES[name]
        if name not in ("embedding", INDICES) and stage.exists(config, layer):
            yield name, (layer, name)


def tokens(bench: Bench) -> Iterator[Try]:
    """The ids whose rows of the embedding the engine has."""
    stated = np.asarray(bench.replay.engine.tokens)[list(bench.case.positions)]
    found = _nearest(bench, stated)
    step = (found - stated) % bench.config.vocab_size
    if (step == 0).all() or (step == 1).all() or (step == bench.config.vocab_size - 1).all():
        return
    rows = np.asarray(bench.replay.engine.checkpoint.embedding_rows(found), np.float64)
    others = [(int(p), int(i), int(j)) for p, i, j in zip(bench.case.positions, found, stated, strict=True) if i != j]
    words = ", ".join(f"token {p} is id {i}, not {j}" for p, i, j in others[:3])
    more = f", and so are {len(others) - 3} more" if len(others) > 3 else ""
    yield Try(found.tolist(), {"rows": rows}, words + more, fitted=True)


def _nearest(bench: Bench, stated: np.ndarray) -> np.ndarray:
    """For each row of the engine the id of the nearest row of the table, its own where that is as near."""
    y, size = bench.engine, bench.config.vocab_size
    checkpoint = bench.replay.engine.checkpoint
    own = np.asarray(checkpoint.embedding_rows(stated), np.float64)
    best, found = _apart(y, own[:, None]).ravel(), stated.copy()
    for start in range(0, size, _ROWS):
        block = np.asarray(checkpoint.tensor("model.embed_tokens.weight", start, min(start + _ROWS, size)), np.float64)
        apart = np.square(y).sum(axis=1)[:, None] - 2 * y @ block.T + np.square(block).sum(axis=1)
        nearest = apart.argmin(axis=1)
        # The quick sum is off by rounding; the nearest row is measured well.
        exact = _apart(y, block[nearest][:, None]).ravel()
        best, found = np.where(exact < best, exact, best), np.where(exact < best, start + nearest, found)
    return found


def _apart(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.square(rows[:, None] - others).sum(axis=-1)
