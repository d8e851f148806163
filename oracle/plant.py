"""The tree of an engine with a known fault, to try the tools on, and whatever is built around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxref.dump import PACKAGES, Job, Offer, Progress, Report, write_tree
from jaxref.pieces import Piece
from jaxref.reader import Reader
from jaxref.stages import STAGES, Key, keys_of
from oracle.bench import Bench
from oracle.case import Case, Unknown, Whole, narrowed
from oracle.engine_tree import EngineTree, Value
from oracle.hypotheses import HYPOTHESES, about
from oracle.replay import Replay
from oracle.runner import EXACT
from oracle.tries import Try
from weights import Checkpoint, UserError

# A variant that changes a stage by less would be hard to tell from half precision's rounding, or from any.
VISIBLE, FAINT = 1e-2, 1e-4
FACTOR = 1.5


@dataclass(frozen=True)
class Plant:
    """A row of the table of hypotheses, and the layers in which the engine does it (None: all)."""

    name: str
    layers: tuple[int, ...] | None

    def strikes(self, key: Key) -> bool:
        """Whether a stage is computed wrongly."""
        layer, stage = key
        return any(row.name == self.name for row in about(stage)) and (
            layer is None or self.layers is None or layer in self.layers
        )


class _Blank(EngineTree):
    """An engine that has not computed anything yet."""

    def __init__(self, checkpoint: Checkpoint, tokens: Sequence[int]) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.tokens, self.count = list(tokens), len(tokens)

    def value(self, key: Key) -> Value | None:
        """Nothing is there, so everything is computed."""
        return None


class _Engine:
    """Runs the table of stages in the engine's numerics, and a variant of the stage that is struck."""

    def __init__(self, job: Job, planted: Plant) -> None:
        self.job, self.planted = job, planted
        self.config = job.checkpoint.config
        self.replay = Replay(_Blank(job.checkpoint, job.tokens), job.numerics.name)
        self.struck: dict[str, str] = {}  # stage -> what was done to it
        self._place: dict[str, int] = {}

    def run(self, offer: Offer, progress: Progress) -> None:
        """Offer every stage. Raises `UserError` where the fault changes nothing."""
        checkpoint = self.job.checkpoint
        with EXACT.context(), Reader(checkpoint, EXACT, None, lambda text: None) as reader:
            layers = (partial(reader.layer, i) for i in range(self.job.selection.depth()))
            for layer, params in enumerate(reader.ahead(layers)):
                if layer == 0:
                    self._embed(offer)
                self.replay.enter(layer, params)
                for key in self._keys(layer):
                    self._stage(self.replay.case(key), offer)
                progress(layer)
            if any(layer is None for layer, _ in self.job.selection.keys()):
                self._head(offer)
        if not self.struck:
            raise UserError(
                f"--fault {self.planted.name}: cannot be planted here: it makes no difference to this model and these"
                " tokens, too little for these numerics, or a stage of another shape"
            )

    def probe(self) -> None:
        """Go as far as the first layer that is struck, and write nothing; raises what `run` would."""
        struck = [key for key in keys_of(self.config) if self.planted.strikes(key)]
        stages, layers = (
            tuple(stage for _, stage in struck),
            tuple(layer for layer, _ in struck[:1] if layer is not None),
        )
        selection = replace(self.job.selection, stages=stages, layers=layers)
        _Engine(replace(self.job, selection=selection), self.planted).run(lambda layer, piece: None, lambda layer: None)

    def _keys(self, layer: int | None) -> list[Key]:
        return [key for key in keys_of(self.config) if key[0] == layer and key[1] != "embedding"]

    def _embed(self, offer: Offer) -> None:
        tokens = np.asarray(self.job.tokens)
        rows = np.asarray(self.job.checkpoint.embedding_rows(tokens), np.float64)
        whole = Whole(embed_tokens=jnp.asarray(rows))
        self.replay.enter(0, whole)
        places = tuple(range(len(tokens)))
        self._stage(Case((0, "embedding"), (np.arange(len(tokens)),), places, whole), offer)

    def _head(self, offer: Offer) -> None:
        checkpoint = self.job.checkpoint
        norm, head = (np.asarray(w, np.float64) for w in (checkpoint.norm(), checkpoint.tensor(checkpoint.head_name)))
        self.replay.enter(None, Whole(norm=jnp.asarray(norm), head=jnp.asarray(head)))
        for key in self._keys(None):
            self._stage(self.replay.case(key), offer)

    def _stage(self, case: Case | Unknown, offer: Offer) -> None:
        assert isinstance(case, Case)  # every stage before it was remembered
        rows = self.job.selection.rows(STAGES[case.stage])
        selected = case.stage == "lm_head" and rows is not None
        if selected:
            case = narrowed(case, tuple(rows or ()))
        value = self.replay.emulate(case)
        if self.planted.strikes(case.key):
            value = self._wrong(case, value)
        value = value.astype(np.int32 if case.stage == "moe_router_indices" else self.job.numerics.compute)
        self.replay.remember(case.key, Value(value.astype(np.float64), case.positions))
        offer(case.key[0], Piece(case.stage, value, selected=selected))  # type: ignore[arg-type]

    def _wrong(self, case: Case, right: np.ndarray) -> np.ndarray:
        """The first variant that shows, the same one in every layer where it makes a difference."""
        bench = Bench(self.replay, case, right)
        # Some variants have a factor that is fitted to what an engine shows.
        tries = list(self._tries(Bench(self.replay, case, FACTOR * right, every=True)))
        place = self._place.get(case.stage)
        if place is None:
            place = self._first(bench, tries)
        elif place >= len(tries) or not _shows(bench, tries[place], FAINT):
            return right
        if place is None:
            return right
        self._place[case.stage] = place
        self.struck.setdefault(case.stage, tries[place].words)
        return bench.run(tries[place].switches)

    def _first(self, bench: Bench, tries: list[Try]) -> int | None:
        """The place of the first variant that shows; in wide numerics, where none does, of the first faint one."""
        wide = self.replay.emulated.compute.itemsize >= 4
        for least in (VISIBLE, FAINT) if wide else (VISIBLE,):
            for place, tried in enumerate(tries):
                if _shows(bench, tried, least):
                    return place
        return None

    def _tries(self, bench: Bench) -> Iterator[Try]:
        for row in about(bench.stage):
            if row.name == self.planted.name:
                yield from row.tries(bench)


def _shows(bench: Bench, tried: Try, least: float) -> bool:
    """Whether a variant changes the rows by more than `least`, or loses some that should be finite."""
    error = bench.error(tried.switches)
    return error > least and (error < math.inf or _lost(bench, tried))


def _lost(bench: Bench, tried: Try) -> bool:
    """Whether values that should be finite are not: nothing else that has no distance can be planted."""
    try:
        found = bench.run(tried.switches)
    except (TypeError, ValueError, IndexError, KeyError):
        return False
    return found.shape == bench.engine.shape and bool((~np.isfinite(found) & np.isfinite(bench.engine)).any())


def names() -> list[str]:
    """The faults that can be planted."""
    return sorted({row.name for row in HYPOTHESES})


def dump_planted(job: Job, planted: Plant, progress: Progress, **where: Any) -> Report:
    """Write the tree of an engine in the job's numerics that computes one thing wrongly.

    The manifest says what under `planted`. Raises `UserError` where the fault is not known or changes nothing.
    """
    if planted.name not in names():
        raise UserError(f"--fault {planted.name}: not known; known are {', '.join(names())}")
    config = job.checkpoint.config
    if not any(planted.strikes(key) for key in keys_of(config)):
        raise UserError(f"--fault {planted.name}: {config.model_type} has no such stage at these layers")
    engine = _Engine(job, planted)
    engine.probe()
    run = job.run("an engine with a planted fault", PACKAGES, where, "engine") | {"planted": planted.name}
    report = write_tree(job, run, lambda offer: engine.run(offer, progress))
    report.read = job.checkpoint.bytes_read
    return report
