"""The tensors behind a result, opened again: pairs of any stage, and which experts each side chose."""

from __future__ import annotations

from jaxref.stages import STAGES, Key
from oracle import experts
from oracle.experts import Choice, Choices
from oracle.layouts import Pair, View, single_position, view
from oracle.measure import measure
from oracle.result import Result


class Pairs:
    """Opens stages of a result's trees side by side, each read when it is asked for."""

    def __init__(self, result: Result) -> None:
        self._trees, self._rules = result.trees, result.rules
        config = next(tree.config for tree in self._trees.values() if tree.config is not None)
        tokens = next(tree.tokens for tree in self._trees.values() if tree.tokens is not None)
        self.dims = config.dims() | {"S": len(tokens)}
        self._single = {role: single_position(tree, self.dims) for role, tree in self._trees.items()}
        self._choices = Choices(self.dims["S"], self.dims["L"])
        self.chosen: dict[tuple[str, int], Choice] = {}  # (role, layer)
        for layer, stage in [c.key for c in result.comparisons]:
            if stage == experts.INDICES and layer is not None:
                for role in self.others:
                    self._choose(role, layer)

    @property
    def others(self) -> list[str]:
        """Every role but the reference."""
        return [role for role in self._trees if role != "reference"]

    def _choose(self, role: str, layer: int) -> None:
        names = (experts.INDICES, experts.LOGITS, experts.WEIGHTS)
        found = {name: self._pair((layer, name), role) for name in names}
        pairs = {name: pair for name, pair in found.items() if pair is not None}
        if experts.INDICES in pairs:
            self.chosen[role, layer] = experts.choose(pairs, self._rules.epsilon)
            self._choices.add(role, layer, pairs, self._rules.epsilon)

    def pair(self, key: Key, role: str) -> Pair | None:
        """A stage of the reference and of another tree in the same layout; None where they have nothing in common."""
        found = self._pair(key, role)
        return measure(found, self._rules.dtype).pair if found else None

    def _pair(self, key: Key, role: str) -> Pair | None:
        if any(key not in self._trees[one].files for one in ("reference", role)):
            return None
        ours, theirs = self.view(key, "reference"), self.view(key, role)
        positions = tuple(sorted(set(ours.positions) & set(theirs.positions)))
        if not positions:
            return None
        pair = Pair(STAGES[key[1]], self.dims, ours, theirs, positions)
        return self._choices.ordered(pair, role, key[0])

    def view(self, key: Key, role: str) -> View:
        """One tree's values of a stage."""
        tree = self._trees[role]
        return view(tree, STAGES[key[1]], tree.open(key), self.dims, self._single[role])

    def after_tie(self, layer: int) -> set[int]:
        """Positions at which another expert ran before this layer's router, by a near tie."""
        return self._choices.tied((layer, experts.INDICES))
