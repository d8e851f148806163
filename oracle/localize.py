"""Each stage's own error: what it makes of the engine's own inputs, free of what it inherited."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxref.model import head_rows
from jaxref.reader import Reader
from jaxref.stages import Key
from oracle import routing
from oracle.beginning import SUM, Beginning, beginning
from oracle.case import INDICES, Case, Unknown, Whole, narrowed, rows_at
from oracle.deviations import distance, worst
from oracle.dumps import Dumps
from oracle.engine_tree import EngineTree, Value
from oracle.floor import MARGIN, ROPE, noise
from oracle.judge import judged
from oracle.local import NO_TOKENS, TELLS, Found, Local
from oracle.measure import LAYOUT_GAIN
from oracle.replay import EXACT, Replay
from oracle.trees import ordered
from oracle.truth import Truth
from oracle.yardstick import Yardstick
from weights import Checkpoint, UserError

Visit = Callable[[Replay, Case, Local, np.ndarray], None]  # is handed each faulty stage while its layer is loaded


def localize(
    checkpoint: Checkpoint,
    folder: str | Path,
    tokens: Sequence[int] | None = None,
    *,
    numerics: str | None = None,
    hf: str | Path | None = None,
    positions: tuple[int, ...] | None = None,
    progress: Callable[[int], None] = lambda layer: None,
    visit: Visit | None = None,
) -> Found:
    """Replay every stage of the tree in `folder` on its own upstream tensors.

    `numerics` is one of `f32 f16 bf16 q8`, or guessed. `hf` is a tree whose local errors, where greater, raise the
    floor, except where it is faulty itself. Raises `UserError` for trees that do not fit the model or each other.
    """
    engine = EngineTree(folder, checkpoint, tokens, positions)
    if not engine.keys:
        raise UserError(f"{folder}: holds no stage of this model")
    job = _Job(engine, engine.numerics(numerics), visit)
    if hf is not None:
        job.yardstick = Yardstick(hf, engine, job.numerics)
    return job.run(progress)


class _Job:
    """One run of `localize`."""

    def __init__(self, engine: EngineTree, numerics: str, visit: Visit | None) -> None:
        self.engine, self.numerics, self.visit = engine, numerics, visit
        self.replay = Replay(engine, numerics)
        self.dumps = Dumps(self.replay)
        self.yardstick: Yardstick | None = None
        self.locals: list[Local] = []
        self.unknown: dict[Key, str] = {}
        self.told: list[str] = []
        self._head_major: set[str] = set()

    def run(self, progress: Callable[[int], None]) -> Found:
        keys = ordered(set(self.engine.keys))
        deepest = max((key[0] for key in keys if key[0] is not None), default=-1)
        whole = any(key[0] is None for key in keys)
        layers = range(self.engine.config.num_hidden_layers if whole and self._chains() else deepest + 1)
        with EXACT.context(), Reader(self.engine.checkpoint, EXACT, None, lambda text: None) as reader:
            self.truth = Truth(self.replay, reader)
            for layer, params in enumerate(reader.ahead(partial(reader.layer, i) for i in layers)):
                self._layer(layer, params, [key for key in keys if key[0] == layer])
                del params
                progress(layer)
            if whole:
                reader.forget()
                self._whole([key for key in keys if key[0] is None], reader)
        notes = self.engine.notes + [f"{stage} lies head-major, and was read so" for stage in sorted(self._head_major)]
        notes += [*self.told, *(self.yardstick.notes() if self.yardstick is not None else ())]
        return Found(self.engine, self.numerics, self.locals, self.unknown, notes)

    def _chains(self) -> bool:
        """Whether the last hidden state is missing, so that it has to be computed."""
        return (self.engine.config.num_hidden_layers - 1, "post_ffn_residual") not in self.engine.tree.files

    def _layer(self, layer: int, params: Any, keys: list[Key]) -> None:
        if layer == 0:
            self._embedding(params, [key for key in keys if key[1] == "embedding"])
        self._enter(layer, params)
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
            self._measure(key, case, truth)
        else:
            self.unknown[key] = TELLS

    def _enter(self, layer: int | None, params: Any) -> None:
        self.replay.enter(layer, params)
        self.dumps.enter(layer)
        if self.yardstick is not None:
            self.yardstick.enter(layer, params)

    def _embedding(self, layer: Any, keys: list[Key]) -> None:
        """Only the rows of the prompt's tokens are read; ids become places in them."""
        tokens = self.engine.tokens
        if tokens is None:
            for key in keys:
                self.unknown[key] = NO_TOKENS
            return
        rows = np.asarray(self.engine.checkpoint.embedding_rows(np.asarray(tokens)), np.float64)
        case = Case(
            (0, "embedding"),
            (np.arange(len(tokens)),),
            tuple(range(len(tokens))),
            Whole(embed_tokens=jnp.asarray(rows)),
        )
        self._enter(0, case.params)
        for key in keys:
            self._measure(key, case, rows)
        if not keys:
            self.replay.enter(0, layer)
            self.replay.remember((0, "embedding"), Value(rows, case.positions, ("embedding",)))

    def _whole(self, keys: list[Key], reader: Reader) -> None:
        checkpoint = self.engine.checkpoint
        norm = jnp.asarray(np.asarray(checkpoint.norm(), np.float64))
        self._enter(None, Whole(norm=norm))
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
            self.unknown[key] = before.reason if isinstance(before, Unknown) else "not readable"
            return
        at = tuple(p for p in own.positions if p in set(before.positions))
        if not at:
            self.unknown[key] = "no position in common with its inputs"
            return
        checkpoint, x = self.engine.checkpoint, rows_at(before, at, "final_norm")
        both = x if truth is None else np.concatenate([x, truth[list(at)]])
        engine = rows_at(own, at, "lm_head")
        case = Case(key, (x,), at, Whole(), through=before.through)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        views = checkpoint.head_blocks(head_rows(self.engine.config))
        for block in reader.ahead(partial(reader.parameters, checkpoint.head_name, view) for view in views):
            self._enter(None, Whole(head=block))
            case = replace(case, params=Whole(head=block))
            found = self.replay.exact(replace(case, inputs=(both,)))
            start = sum(part.shape[1] for part, _ in parts)
            rows = engine[:, start : start + found.shape[1]]
            parts.append((found, self._emulated(case, rows, found[: len(at)])))
        exact, emulated = (np.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True))
        row = self._judged(case, engine, exact[: len(at)], emulated, exact[len(at) :] if truth is not None else None)
        if row.faulty:  # whoever looks into it needs the head as a whole
            head = jnp.asarray(np.asarray(checkpoint.tensor(checkpoint.head_name), np.float64))
            self._enter(None, Whole(norm=norm, head=head))
            self.replay.remember((None, "final_norm"), before)
            case = replace(case, params=Whole(norm=norm, head=head))
        self._keep(row, case, engine)

    def _stage(self, key: Key, truth: np.ndarray | None) -> None:
        case = self.replay.case(key)
        if isinstance(case, Unknown):
            self.unknown[key] = case.reason
            return
        self._measure(key, case, truth)

    def _measure(self, key: Key, case: Case, truth: np.ndarray | None) -> None:
        own = self.replay.value(key)
        assert isinstance(own, Value)
        at = tuple(p for p in case.positions if p in set(own.positions))
        if not at:
            self.unknown[key] = "no position in common with its inputs"
            return
        case = narrowed(case, at)
        engine, through = rows_at(own, at, key[1]), case.through
        if key[1] == INDICES:
            row = routing.judge(key, case, engine, self.replay, self.numerics)
            self._keep(row, case, engine)
            return
        exact = self.replay.exact(case)
        if engine.shape != exact.shape:
            words = f"{list(engine.shape)} values, not {list(exact.shape)}"
            limit = MARGIN * noise(key[1], max(at), self.engine.dims)
            self._keep(Local(key, math.inf, 0.0, limit, wrong=words, through=through), case, engine)
            return
        engine = self._put_in_order(key, case, own, engine, exact)
        self._keep(self._judged(case, engine, exact, self._emulated(case, engine, exact), truth), case, engine, exact)

    def _emulated(self, case: Case, engine: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """The stage with the engine's roundings; not computed where the order of sums alone explains the error."""
        least = noise(case.stage, max(case.positions), self.engine.dims)
        fine = distance(case.stage, engine, exact, case.positions) <= MARGIN * least and np.isfinite(engine).all()
        return exact if fine else self.replay.emulate(case)

    def _judged(
        self, case: Case, engine: np.ndarray, exact: np.ndarray, emulated: np.ndarray, truth: np.ndarray | None
    ) -> Local:
        """The stage's own error beside what rounding makes of it, and what it inherited."""
        key, at, stage = case.key, case.positions, case.stage
        row = judged(case, engine, exact, emulated, self.engine.dims, self.numerics)
        accumulated = None
        # An error over the finite values alone would tell nothing of the others.
        if truth is not None and not row.bad and not row.tainted:
            accumulated = self.truth.accumulated(key, engine, truth, at)
        row = replace(row, accumulated=accumulated, inherited=self.truth.inherited(key))
        return replace(row, where=worst(stage, engine, exact, at, self.engine.dims, row.limit)) if row.faulty else row

    def _settled(self, row: Local, case: Case, engine: np.ndarray) -> Local:
        """A faulty row looked at again: on what its inputs should be, and beside the yardstick."""
        if not row.faulty or row.wrong is not None:
            return row

        def judge(other: Case) -> Local:
            exact = self.replay.exact(other)
            return self._judged(other, engine, exact, self._emulated(other, engine, exact), None)

        if (right := self.dumps.right(case, judge)) is not None:
            return replace(right, accumulated=row.accumulated, inherited=None)  # what came in is not what was dumped
        return row if self.yardstick is None else self.yardstick.raised(row, case)

    def _put_in_order(self, key: Key, case: Case, own: Value, engine: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """q or k that fits only when read head-major is read so, here and by the stages that follow."""
        if key[1] not in ROPE or len(case.positions) < 2 or case.positions != own.positions:
            return engine
        heads = exact.shape[1] // self.engine.dims["h"]
        turned = engine.reshape(heads, len(engine), -1).transpose(1, 0, 2).reshape(engine.shape)
        plain, other = (distance(key[1], x, exact, case.positions) for x in (engine, turned))
        if other * LAYOUT_GAIN >= plain or heads == 1:
            return engine
        self._head_major.add(key[1])
        self.replay.remember(key, Value(turned, own.positions))
        return turned

    def _keep(self, row: Local, case: Case, engine: np.ndarray, exact: np.ndarray | None = None) -> None:
        row = self._settled(row, case, engine)
        self.locals.append(row)
        if row.faulty and exact is not None:
            self.dumps.remember(case, exact)
        if row.faulty and self.visit is not None:
            self.visit(self.replay, case, row, engine)
