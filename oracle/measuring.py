"""The stages of one engine's tree measured one by one, each on its own inputs, and what is found kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jaxref.stages import Key
from oracle import routing
from oracle.case import INDICES, Case, narrowed, rows_at, shared_positions
from oracle.deviations import distance, worst
from oracle.dumps import Dumps
from oracle.engine_tree import EngineTree, Value
from oracle.floor import MARGIN, ROPE, noise
from oracle.judge import judged
from oracle.local import Local
from oracle.measure import LAYOUT_GAIN
from oracle.replay import Replay
from oracle.truth import Truth
from oracle.yardstick import Yardstick

Visit = Callable[[Replay, Case, Local, np.ndarray], None]  # is handed each faulty stage while its layer is loaded


class Measuring:
    """What is measured of a tree: `locals`, a row a stage, and `unknown`, the stages that cannot be replayed, and why.

    `truth` is given once the checkpoint is being read; a `yardstick` raises the floor.
    """

    truth: Truth

    def __init__(self, engine: EngineTree, numerics: str, visit: Visit | None) -> None:
        self.engine, self.numerics, self.visit = engine, numerics, visit
        self.replay = Replay(engine, numerics)
        self.yardstick: Yardstick | None = None
        self.locals: list[Local] = []
        self.unknown: dict[Key, str] = {}
        self._dumps = Dumps(self.replay)
        self._head_major: set[str] = set()
        self._roundings: dict[tuple[Key, tuple[int, ...]], float] = {}

    def enter(self, layer: int | None, params: Any) -> None:
        """Go on to a layer (None: the whole model) with its parameters in float64."""
        self.replay.enter(layer, params)
        self._dumps.enter(layer)
        if self.yardstick is not None:
            self.yardstick.enter(layer, params)

    def notes(self) -> list[str]:
        """What a reader has to know of how the tree was read."""
        notes = [f"{stage} lies head-major, and was read so" for stage in sorted(self._head_major)]
        return notes + list(self.yardstick.notes() if self.yardstick is not None else ())

    def measure(self, key: Key, case: Case, truth: np.ndarray | None) -> None:
        """The engine's rows of a stage beside what its case gives; `truth` is what they should be."""
        own = self.replay.value(key)
        assert isinstance(own, Value)
        at = shared_positions(case.positions, own.positions)
        if not at:
            self.unknown[key] = "no position in common with its inputs"
            return
        case = narrowed(case, at)
        engine, through = rows_at(own, at, key[1]), case.through
        if key[1] == INDICES:
            row = routing.judge(key, case, engine, self.replay, self.numerics)
            self.keep(row, case, engine)
            return
        exact = self.replay.exact(case)
        if engine.shape != exact.shape:
            words = f"{list(engine.shape)} values, not {list(exact.shape)}"
            limit = MARGIN * noise(key[1], max(at), self.engine.dims)
            self.keep(Local(key, math.inf, 0.0, limit, wrong=words, through=through), case, engine)
            return
        engine = self._put_in_order(key, case, own, engine, exact)
        self.keep(self.judged(case, engine, exact, self.emulated(case, engine, exact), truth), case, engine, exact)

    def emulated(self, case: Case, engine: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """The stage with the engine's roundings; not computed where the order of sums alone explains the error."""
        least = noise(case.stage, max(case.positions), self.engine.dims)
        fine = distance(case.stage, engine, exact, case.positions) <= MARGIN * least and np.isfinite(engine).all()
        return exact if fine else self.replay.emulate(case)

    def judged(
        self, case: Case, engine: np.ndarray, exact: np.ndarray, emulated: np.ndarray, truth: np.ndarray | None
    ) -> Local:
        """The stage's own error beside what rounding makes of it, and what it inherited."""
        key, at, stage = case.key, case.positions, case.stage
        row = judged(case, engine, exact, emulated, self.engine.dims, self.numerics)
        if case.through and row.faulty and key[1] != "lm_head":  # what a norm makes of rounding is in its floor
            floor = max(row.floor, self._rounding(case))
            row = replace(row, floor=floor, limit=MARGIN * floor)
        accumulated = None
        # An error over the finite values alone would tell nothing of the others.
        if truth is not None and not row.bad and not row.tainted:
            accumulated = self.truth.accumulated(key, engine, truth, at)
        row = replace(row, accumulated=accumulated, inherited=self.truth.inherited(key))
        return replace(row, where=worst(stage, engine, exact, at, self.engine.dims, row.limit)) if row.faulty else row

    def _rounding(self, case: Case) -> float:
        """What the engine's roundings in the stages that its tree lacks make of a stage: a softmax makes much of it."""
        place = case.key, case.positions
        if place not in self._roundings:
            exact, rounded = self.replay.case(case.key), self.replay.rounded(case.key)
            if not isinstance(exact, Case) or not isinstance(rounded, Case):
                return 0.0
            rows = (
                self.replay.emulate(narrowed(rounded, case.positions)),
                self.replay.exact(narrowed(exact, case.positions)),
            )
            self._roundings[place] = distance(case.stage, *rows, case.positions)
        return self._roundings[place]

    def _settled(self, row: Local, case: Case, engine: np.ndarray) -> Local:
        """A faulty row looked at again: on what its inputs should be, and beside the yardstick."""
        if not row.faulty or row.wrong is not None:
            return row

        def judge(other: Case) -> Local:
            exact = self.replay.exact(other)
            return self.judged(other, engine, exact, self.emulated(other, engine, exact), None)

        if (right := self._dumps.right(case, judge)) is not None:
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

    def keep(self, row: Local, case: Case, engine: np.ndarray, exact: np.ndarray | None = None) -> None:
        """Keep a row; `exact` is what the case gives, for the stages that come after a faulty one."""
        row = self._settled(row, case, engine)
        self.locals.append(row)
        if row.faulty and exact is not None:
            self._dumps.remember(case, exact)
        if row.faulty and self.visit is not None:
            self.visit(self.replay, case, row, engine)
