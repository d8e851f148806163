"""Each stage's own error: what it makes of the engine's own inputs, free of what it inherited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxref.model import head_rows
from jaxref.reader import Reader
from jaxref.stages import Key
from oracle.beginning import SUM, Beginning, beginning
from oracle.case import Case, Unknown, Whole, rows_at, shared_positions
from oracle.engine_tree import EngineTree, Value
from oracle.local import NO_TOKENS, TELLS, Found, other_weights
from oracle.measuring import Measuring, Visit
from oracle.runner import EXACT
from oracle.sources import Given
from oracle.stored import one_type_wrong
from oracle.trees import ordered
from oracle.truth import Truth
from oracle.yardstick import Yardstick
from weights import Checkpoint, UserError


def localize(
    checkpoint: Checkpoint,
    tree: Given,
    tokens: Sequence[int] | None = None,
    *,
    numerics: str | None = None,
    hf: Given | None = None,
    positions: tuple[int, ...] | None = None,
    progress: Callable[[int], None] = lambda layer: None,
    visit: Visit | None = None,
) -> Found:
    """Replay every stage of an engine's `tree` on its own upstream tensors.

    `numerics` is one of `f32 f16 bf16 q8`, or guessed. `hf` is a tree whose local errors, where greater, raise the
    floor, except where it is faulty itself. Raises `UserError` for trees that do not fit the model or each other.
    """
    engine = EngineTree(tree, checkpoint, tokens, positions)
    if not engine.keys:
        raise UserError(f"{engine.tree.folder}: holds no stage of this model")
    job = _Job(engine, engine.numerics(numerics), visit)
    if hf is not None:
        job.measuring.yardstick = Yardstick(hf, engine, job.numerics)
    return job.run(progress)


class _Job:
    """One run of `localize`."""

    def __init__(self, engine: EngineTree, numerics: str, visit: Visit | None) -> None:
        self.engine, self.numerics = engine, numerics
        self.measuring = Measuring(engine, numerics, visit)
        self.replay = self.measuring.replay
        self.told: list[str] = []

    def run(self, progress: Callable[[int], None]) -> Found:
        keys = ordered(set(self.engine.keys))
        deepest = max((key[0] for key in keys if key[0] is not None), default=-1)
        whole = any(key[0] is None for key in keys)
        layers = range(self.engine.config.num_hidden_layers if whole and self._chains() else deepest + 1)
        with EXACT.context(), Reader(self.engine.checkpoint, EXACT, None, lambda text: None) as reader:
            self.truth = self.measuring.truth = Truth(self.replay, reader)
            for layer, params in enumerate(reader.ahead(partial(reader.layer, i) for i in layers)):
                self._layer(layer, params, [key for key in keys if key[0] == layer])
                del params
                progress(layer)
            if whole:
                reader.forget()
                self._whole([key for key in keys if key[0] is None], reader)
        rows = self.measuring.locals
        told = [*self.told, *other_weights(rows), *one_type_wrong(self.engine.checkpoint, rows)]
        notes = [*self.engine.notes, *told, *self.measuring.notes()]
        return Found(self.engine, self.numerics, self.measuring.locals, self.measuring.unknown, notes)

    def _chains(self) -> bool:
        """Whether the last hidden state is missing, so that it has to be computed."""
        return (self.engine.config.num_hidden_layers - 1, "post_ffn_residual") not in self.engine.tree.files

    def _layer(self, layer: int, params: Any, keys: list[Key]) -> None:
        if layer == 0:
            self._embedding(params, [key for key in keys if key[1] == "embedding"])
        self.measuring.enter(layer, params)
        began, reference = self._before(layer), self.truth.layer(layer, params)
        for key in keys:
            if key[1] == SUM and began is not None:
                self._after(key, began, reference.get(SUM))
            elif key[1] != "embedding":
                self._stage(key, reference.get(key[1]))
        # The next layer may have to begin here.
        if (layer, "post_ffn_residual") not in self.engine.tree.files:
            self.replay.value((layer, "post_ffn_residual"))

    def _before(self, layer: int) -> Beginning | None:
        """The hidden state before a layer where the sum after it tells it; a note says so, and how right it is."""
        began = beginning(self.replay, layer, self.numerics)
        if began is None:
            return None
        self.replay.remember(began.key, began.told)
        error = self.truth.before(began.key, began.told)
        far = "" if error is None else f", {error:.2g} from the truth"
        words = "" if began.vouched else "; if attn_norm is wrong, that sum may be"
        self.told.append(f"the hidden state before layer {layer} is post_attn_residual less attn_out{far}{words}")
        return began

    def _after(self, key: Key, began: Beginning, truth: np.ndarray | None) -> None:
        """The sum that tells the state before it, judged on what the layers before give, where it is right on that."""
        case = self.replay.case(key, {began.key: began.followed}) if began.followed and began.vouched else None
        if isinstance(case, Case):
            self.measuring.measure(key, case, truth)
        else:
            self.measuring.unknown[key] = TELLS

    def _embedding(self, layer: Any, keys: list[Key]) -> None:
        """Only the rows of the prompt's tokens are read; ids become places in them."""
        tokens = self.engine.tokens
        if tokens is None:
            for key in keys:
                self.measuring.unknown[key] = NO_TOKENS
            return
        rows = np.asarray(self.engine.checkpoint.embedding_rows(np.asarray(tokens)), np.float64)
        case = Case(
            (0, "embedding"),
            (np.arange(len(tokens)),),
            tuple(range(len(tokens))),
            Whole(embed_tokens=jnp.asarray(rows)),
        )
        self.measuring.enter(0, case.params)
        for key in keys:
            self.measuring.measure(key, case, rows)
        if not keys:
            self.replay.enter(0, layer)
            self.replay.remember((0, "embedding"), Value(rows, case.positions, ("embedding",)))

    def _whole(self, keys: list[Key], reader: Reader) -> None:
        checkpoint = self.engine.checkpoint
        norm = jnp.asarray(np.asarray(checkpoint.norm(), np.float64))
        self.measuring.enter(None, Whole(norm=norm))
        truth = self.truth.final_norm(norm)
        for key in (key for key in keys if key[1] == "final_norm"):
            self._stage(key, truth)
        if (None, "lm_head") in keys:
            self._head(norm, truth, reader)

    def _head(self, norm: Any, truth: np.ndarray | None, reader: Reader) -> None:
        """The head in blocks of the vocabulary, each widened once for the engine's rows and for the truth's."""
        key = (None, "lm_head")
        before, own = self.replay.value((None, "final_norm")), self.engine.value(key)
        if isinstance(before, Unknown) or own is None:
            self.measuring.unknown[key] = before.reason if isinstance(before, Unknown) else "not readable"
            return
        at = shared_positions(own.positions, before.positions)
        if not at:
            self.measuring.unknown[key] = "no position in common with its inputs"
            return
        checkpoint, x = self.engine.checkpoint, rows_at(before, at, "final_norm")
        both = x if truth is None else np.concatenate([x, truth[list(at)]])
        engine = rows_at(own, at, "lm_head")
        case = Case(key, (x,), at, Whole(), through=before.through)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        views = checkpoint.head_blocks(head_rows(self.engine.config))
        for block in reader.ahead(partial(reader.parameters, checkpoint.head_name, view) for view in views):
            self.measuring.enter(None, Whole(head=block))
            case = replace(case, params=Whole(head=block))
            found = self.replay.exact(replace(case, inputs=(both,)))
            start = sum(part.shape[1] for part, _ in parts)
            rows = engine[:, start : start + found.shape[1]]
            parts.append((found, self.measuring.emulated(case, rows, found[: len(at)])))
        exact, emulated = (np.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True))
        row = self.measuring.judged(
            case, engine, exact[: len(at)], emulated, exact[len(at) :] if truth is not None else None
        )
        if row.faulty:  # whoever looks into it needs the head as a whole
            head = jnp.asarray(np.asarray(checkpoint.tensor(checkpoint.head_name), np.float64))
            self.measuring.enter(None, Whole(norm=norm, head=head))
            self.replay.remember((None, "final_norm"), before)
            case = replace(case, params=Whole(norm=norm, head=head))
        self.measuring.keep(row, case, engine)

    def _stage(self, key: Key, truth: np.ndarray | None) -> None:
        case = self.replay.case(key)
        if isinstance(case, Unknown):
            self.measuring.unknown[key] = case.reason
            return
        self.measuring.measure(key, case, truth)
