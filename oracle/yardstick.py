"""A third tree in the engine's numerics: what another program does as badly is rounding, unless it is wrong itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jaxref.stages import Key
from oracle.case import Case, narrowed, rows_at, shared_positions
from oracle.engine_tree import EngineTree, Value
from oracle.floor import MARGIN
from oracle.judge import judged
from oracle.local import Local
from oracle.replay import Replay
from oracle.same import SAME_MODEL, stated_weights
from oracle.sources import Given
from oracle.trees import Tree, path_of
from weights import Checkpoint, UserError
from weights.errors import listed
from weights.identity import differing


class Yardstick:
    """The tree of a yardstick, replayed where the engine's own error is beyond its floor."""

    def __init__(self, given: Given, engine: EngineTree, numerics: str) -> None:
        """Raises `UserError` where its manifest tells of another model, other tokens or another dtype."""
        _same_run(Tree(given, "yardstick"), engine.checkpoint, engine.tokens)
        self.tree = EngineTree(given, engine.checkpoint, engine.tokens, role="yardstick")
        if self.tree.count != engine.count:
            words = f"{self.tree.count} tokens, the engine's of {engine.count}"
            raise UserError(f"{self.tree.tree.folder}: the yardstick is of {words}")
        stated = self.tree.tree.stated_dtype or self.tree.tree.stated_activations == "q8"
        if stated and (theirs := self.tree.numerics(None)) != numerics:
            words = f"the yardstick computes in {theirs}, the engine in {numerics} (--numerics)"
            raise UserError(f"{self.tree.tree.folder}: {words}; its rounding is no measure of the engine's")
        self.numerics = numerics
        self.replay = Replay(self.tree, numerics)
        self._distrusted: dict[str, list[Key]] = {}

    def enter(self, layer: int | None, params: Any) -> None:
        """Go on to a layer (None: the whole model), as `Replay.enter`."""
        self.replay.enter(layer, params)

    def raised(self, row: Local, case: Case) -> Local:
        """The engine's row with the yardstick's own error for its floor, where that is greater and itself no fault."""
        theirs = self._row(case)
        if theirs is None:
            return row
        if theirs.faulty:
            self._distrusted.setdefault(case.stage, []).append(case.key)
            return row
        floor = max(row.floor, theirs.local)
        row = replace(row, floor=floor, limit=MARGIN * floor)
        return row if row.faulty else replace(row, where={})

    def _row(self, case: Case) -> Local | None:
        """Its own error at the stage of the engine's case; None where it cannot be replayed."""
        key, files = case.key, self.tree.tree.files
        own = self.replay.value(key) if key in files else None
        # The embedding's case holds places in the rows that were read, and these are the same for both.
        theirs = case if case.stage == "embedding" else self.replay.case(key)
        if not isinstance(own, Value) or not isinstance(theirs, Case):
            return None
        at = shared_positions(theirs.positions, own.positions)
        if not at:
            return None
        theirs, rows = narrowed(theirs, at), rows_at(own, at, case.stage)
        exact = self.replay.exact(theirs)
        if rows.shape != exact.shape:
            return None
        return judged(theirs, rows, exact, self.replay.emulate(theirs), self.tree.dims, self.numerics)

    def notes(self) -> Iterator[str]:
        """Where the yardstick is wrong itself."""
        for keys in self._distrusted.values():
            more = f" and {len(keys) - 1} other layers" if len(keys) > 2 else " and another layer" * (len(keys) - 1)
            yield f"the yardstick is itself wrong at {path_of(keys[0])}{more}: it does not raise the floor there"


def _same_run(tree: Tree, checkpoint: Checkpoint, tokens: list[int] | None) -> None:
    """Raise `UserError` for a manifest of another model, or of other tokens."""
    if tree.config is not None:
        pairs = [(name, getattr(tree.config, name), getattr(checkpoint.config, name)) for name in SAME_MODEL]
        if words := [f"{name} {theirs}, not {ours}" for name, theirs, ours in pairs if theirs != ours]:
            raise UserError(f"{tree.folder}: the yardstick is of another model: {'; '.join(words)}")
    made_of = stated_weights(tree)
    if made_of and (others := differing(checkpoint.identity(), made_of)):
        words = f"it was made from other bytes of {listed(others)} than the model's"
        raise UserError(f"{tree.folder}: the yardstick is of another model: {words}")
    if None not in (tree.tokens, tokens) and tree.tokens != tokens:
        raise UserError(f"{tree.folder}: the yardstick is of other tokens than the engine's tree")
