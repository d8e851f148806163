"""What each stage of an engine's tree is computed from: its own upstream tensors, and what follows for missing ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxref.stages import STAGES, TOKENS, Key, inputs_of
from oracle.case import INDICES, WHOLE, Case, Unknown, rows_at, shared_positions
from oracle.engine_tree import EngineTree, Value
from oracle.local import NO_TOKENS
from oracle.runner import Runner
from oracle.trees import path_of


class Replay(Runner):
    """Replays the stages of one engine's tree, layer by layer. `params` of the present layer are set by `enter`."""

    def __init__(self, engine: EngineTree, numerics: str) -> None:
        super().__init__(engine.checkpoint, numerics)
        self.engine = engine
        self._known: dict[Key, Value | Unknown] = {}
        self._upstream: dict[Key, list[Key | str]] = {}
        self._below: dict[Key, frozenset[Key]] = {}

    def enter(self, layer: int | None, params: Any) -> None:
        """Go on to a layer (None: the whole model) with its parameters in float64, and forget the one before."""
        super().enter(layer, params)
        hidden = {key: value for key, value in self._known.items() if key[1] in ("post_ffn_residual", "embedding")}
        self._known, self._below = hidden, {}

    def value(self, key: Key, instead: Mapping[Key, Value] | None = None) -> Value | Unknown:
        """The engine's own rows of a stage, or what follows for them from the nearest stages that it has.

        Values in `instead` are taken for the engine's of their stages.
        """
        return self._value(key, dict(instead or {}))

    def _value(self, key: Key, instead: dict[Key, Value | Unknown]) -> Value | Unknown:
        """`value`; what follows from `instead` is added to it, since several stages read it."""
        if key in instead:
            return instead[key]
        if instead and not self._rests_on(key).isdisjoint(instead):
            instead[key] = self._chained(key, instead)
            return instead[key]
        if key not in self._known:
            self._known[key] = self.engine.value(key) or self._chained(key, {})
        return self._known[key]

    def remember(self, key: Key, value: Value | Unknown) -> None:
        """Take this for the engine's rows of a stage of the present layer."""
        self._known[key] = value

    def upstream(self, key: Key) -> list[Key | str]:
        """The keys of the stages that this one reads; `tokens` and `positions` as words."""
        if key not in self._upstream:
            self._upstream[key] = inputs_of(STAGES[key[1]], self.config, key[0])
        return self._upstream[key]

    def _rests_on(self, key: Key) -> frozenset[Key]:
        """All stages that a missing one of the present layer is computed from; none for one that the tree has."""
        if key in self.engine.tree.files or key[0] != self._layer:
            return frozenset()
        if key not in self._below:
            above = [name for name in self.upstream(key) if not isinstance(name, str)]
            self._below[key] = frozenset(above).union(*map(self._rests_on, above))
        return self._below[key]

    def _chained(self, key: Key, instead: dict[Key, Value | Unknown]) -> Value | Unknown:
        case = self._case(key, instead)
        if isinstance(case, Unknown):
            return case
        many = self._as_many(key)
        rows = self.followed(case) if instead and not many else self.exact(case, **many)
        return Value(rows, case.positions, (*case.through, path_of(key)))

    def _as_many(self, key: Key) -> dict[str, int]:
        """For weights of experts that are missing: as many as the engine has ids."""
        ids = self.engine.value((key[0], INDICES)) if key[1] == "moe_router" else None
        return {} if ids is None else {"count": ids.array.shape[1]}

    def case(self, key: Key, instead: Mapping[Key, Value] | None = None) -> Case | Unknown:
        """What a stage of the present layer is computed from; `instead` as for `value`."""
        return self._case(key, dict(instead or {}))

    def _case(self, key: Key, instead: dict[Key, Value | Unknown]) -> Case | Unknown:
        layer, stage = key
        if layer != self._layer and not (layer is None and self._layer is None):
            return Unknown(f"{path_of(key)} is missing, and nothing before it is there")
        values: list[Value | str] = []
        for name in self.upstream(key):
            if isinstance(name, str):
                if name == TOKENS and self.engine.tokens is None:
                    return Unknown(NO_TOKENS)
                values.append(name)
                continue
            value = self._value(name, instead)
            if isinstance(value, Unknown):
                return value
            if (stage, len(values)) in WHOLE and len(value.positions) < self.engine.count:
                return Unknown(f"{path_of(name)} does not hold all positions")
            values.append(value)
        return self._gather(key, values)

    def rounded(self, key: Key, instead: Mapping[Key, Value] | None = None) -> Case | Unknown:
        """`case`, with what the tree lacks in this layer computed with the engine's roundings.

        Which experts are chosen is left as it is: rounding decides between near ties alone.
        """
        made: dict[Key, Value | Unknown] = dict(instead or {})
        for name in self.lacking(key):
            if name in made:
                continue
            case = self.case(name, instead) if name[1] == INDICES else self._case(name, made)
            if isinstance(case, Case):
                compute = self.exact if name[1] == INDICES else self.emulate
                made[name] = Value(compute(case, **self._as_many(name)), case.positions, (*case.through, path_of(name)))
        return self._case(key, made)

    def lacking(self, key: Key) -> list[Key]:
        """What a stage is computed from that the tree lacks, of the present layer, in computation order.

        The embedding is left out: its rows are the checkpoint's.
        """
        above = [name for name in self.upstream(key) if not isinstance(name, str)]
        found = frozenset(above).union(*map(self._rests_on, above)) - self.engine.tree.files.keys()
        return [(key[0], stage) for stage in STAGES if stage != "embedding" and (key[0], stage) in found]

    def _gather(self, key: Key, values: list[Value | str]) -> Case | Unknown:
        stage = key[1]
        rowwise = [v for i, v in enumerate(values) if isinstance(v, Value) and (stage, i) not in WHOLE]
        alike, experts = {value.positions for value in rowwise}, None
        at = next(iter(alike)) if len(alike) == 1 else self._common(alike)
        through = [name for v in values if isinstance(v, Value) for name in v.through]
        if STAGES[stage].per_expert:
            chosen = self.value((key[0], INDICES))
            if isinstance(chosen, Unknown):
                return chosen
            at = shared_positions(at, chosen.positions)
            experts = rows_at(chosen, at, stage).astype(int)
            through += chosen.through
            if experts.size and not 0 <= experts.min() <= experts.max() < self.config.num_experts:
                return Unknown(f"{path_of((key[0], INDICES))} names experts that do not exist")
        if not at:
            return Unknown("its inputs have no position in common")
        inputs: list[np.ndarray] = []
        for i, value in enumerate(values):
            if isinstance(value, Value):
                inputs.append(value.array if (stage, i) in WHOLE else rows_at(value, at, stage))
            elif value == TOKENS:
                inputs.append(np.asarray(self.engine.tokens)[list(at)])
            else:
                inputs.append(self._positions(stage, i, at, inputs))
        return Case(key, tuple(inputs), at, self._params, experts, tuple(dict.fromkeys(through)))

    def _common(self, several: set[tuple[int, ...]]) -> tuple[int, ...]:
        """What all of them have; all positions where there are none of them."""
        return tuple(sorted(set(range(self.engine.count)).intersection(*several)))

    @staticmethod
    def _positions(stage: str, index: int, at: tuple[int, ...], before: list[np.ndarray]) -> np.ndarray:
        if stage == "attn_softmax" and index == 2:
            return np.arange(before[0].shape[-1])
        return np.asarray(at)
