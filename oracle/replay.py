"""Any stage computed again on an engine's own upstream tensors, exactly and with the engine's roundings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxref.activations import Weight, activation_of
from jaxref.precision import NUMERICS, Numerics
from jaxref.stages import POSITIONS, STAGES, TOKENS, Key
from oracle.case import INDICES, WHOLE, Case, Unknown, Whole, rows_at
from oracle.engine_tree import EngineTree, Value
from oracle.local import NO_TOKENS
from oracle.trees import path_of
from oracle.variants import variant_of
from weights import Expert
from weights.params import expert_names, layer_names

EXACT = NUMERICS["float64"]
# Numbers that a stage reads; with more of them JAX is the faster one.
SMALL = 1 << 20


class Replay:
    """Replays the stages of one engine's tree, layer by layer. `params` of the present layer are set by `enter`."""

    def __init__(self, engine: EngineTree, numerics: str) -> None:
        self.engine, self.config = engine, engine.config
        self.q8 = numerics == "q8"
        self.emulated: Numerics = NUMERICS["float32" if self.q8 else numerics]
        self._known: dict[Key, Value | Unknown] = {}
        self._upstream: dict[Key, list[Key | str]] = {}
        self._below: dict[Key, frozenset[Key]] = {}
        self._experts: dict[tuple[int, int], Expert] = {}
        self._params: Any = None
        self._rounded: Any = None
        self._layer: int | None = -1

    def enter(self, layer: int | None, params: Any) -> None:
        """Go on to a layer (None: the whole model) with its parameters in float64, and forget the one before."""
        hidden = {key: value for key, value in self._known.items() if key[1] in ("post_ffn_residual", "embedding")}
        self._known, self._below, self._experts = hidden, {}, {}
        self._layer, self._params, self._rounded = layer, params, None

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
            self._upstream[key] = STAGES[key[1]].upstream(self.config, key[0])
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
        rows = self._followed(case) if instead and not many else self.exact(case, **many)
        return Value(rows, case.positions, (*case.through, path_of(key)))

    def _followed(self, case: Case) -> np.ndarray:
        """`exact` for those who ask often: JAX takes longer to start a small stage than NumPy to compute it."""
        function, stage = variant_of(case.stage), STAGES[case.stage]
        if function is None or stage.per_expert or sum(x.size for x in case.inputs) > SMALL:
            return self.exact(case)
        w = {field: np.asarray(getattr(case.params, field)) for field in stage.params}
        with np.errstate(all="ignore"):
            return function(list(case.inputs), w, stage.settings(self.config, case.key[0] or 0))

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
        positions = set(range(self.engine.count))
        for value in rowwise:
            positions &= set(value.positions)
        experts = None
        through = [name for v in values if isinstance(v, Value) for name in v.through]
        if STAGES[stage].per_expert:
            chosen = self.value((key[0], INDICES))
            if isinstance(chosen, Unknown):
                return chosen
            positions &= set(chosen.positions)
            experts = rows_at(chosen, tuple(sorted(positions)), stage).astype(int)
            through += chosen.through
            if experts.size and not 0 <= experts.min() <= experts.max() < self.config.num_experts:
                return Unknown(f"{path_of((key[0], INDICES))} names experts that do not exist")
        if not positions:
            return Unknown("its inputs have no position in common")
        at = tuple(sorted(positions))
        inputs: list[np.ndarray] = []
        for i, value in enumerate(values):
            if isinstance(value, Value):
                inputs.append(value.array if (stage, i) in WHOLE else rows_at(value, at, stage))
            elif value == TOKENS:
                inputs.append(np.asarray(self.engine.tokens)[list(at)])
            else:
                inputs.append(self._positions(stage, i, at, inputs))
        return Case(key, tuple(inputs), at, self._params, experts, tuple(dict.fromkeys(through)))

    @staticmethod
    def _positions(stage: str, index: int, at: tuple[int, ...], before: list[np.ndarray]) -> np.ndarray:
        if stage == "attn_softmax" and index == 2:
            return np.arange(before[0].shape[-1])
        return np.asarray(at)

    def exact(self, case: Case, **changes: Any) -> np.ndarray:
        """The stage in float64. `changes` replace its settings."""
        return self._run(case, EXACT, case.params, **changes)

    def emulate(self, case: Case, **changes: Any) -> np.ndarray:
        """The stage with the engine's numerics: parameters, inputs and output rounded, activations too for q8."""
        if self._rounded is None:
            self._rounded = self._round(case.params)
        return self._run(case, self.emulated, self._rounded, **changes)

    def _round(self, params: Any) -> Any:
        narrow = _narrowed(params, self.emulated)
        if not self.q8:
            return narrow
        whole = isinstance(narrow, Whole)
        names = (
            {"head": self.engine.checkpoint.head_name} if whole else vars(layer_names(self.config, self._layer or 0))
        )
        wrapped = {
            field: self._weight(value, names[field])
            for field, value in vars(narrow).items()
            if field in names and field != "experts" and value is not None and value.ndim > 1
        }
        return narrow.replace(**wrapped)

    def _weight(self, values: Any, name: str) -> Any:
        kind = activation_of(self.engine.checkpoint, name)
        return values if kind is None else Weight(values, kind)

    def _run(self, case: Case, numerics: Numerics, params: Any, **changes: Any) -> np.ndarray:
        stage, layer = STAGES[case.stage], case.key[0]
        if stage.per_expert:
            return self._run_experts(case, numerics, **changes)
        with EXACT.context(), np.errstate(all="ignore"):
            inputs: list[Any] = [
                self._cast(x, name, numerics) for x, name in zip(case.inputs, stage.inputs, strict=True)
            ]
            found = stage.run(inputs, params, self.config, layer, numerics, **changes)
            return np.asarray(found).astype(np.float64)

    @staticmethod
    def _cast(x: np.ndarray, name: str, numerics: Numerics) -> Any:
        if name in (TOKENS, POSITIONS) or name == INDICES:
            return np.asarray(x, np.int32)
        return np.asarray(x, numerics.compute)

    def _run_experts(self, case: Case, numerics: Numerics, **changes: Any) -> np.ndarray:
        """An expert's stage for each token and rank [rows, A, ·]: one product an expert that is used."""
        stage, x = STAGES[case.stage], case.inputs[0]
        assert case.experts is not None
        if x.ndim == 2:
            x = np.broadcast_to(x[:, None], (*case.experts.shape, x.shape[-1]))
        found: np.ndarray | None = None
        for number in np.unique(case.experts):
            rows = np.nonzero(case.experts == number)
            params = self.expert(int(case.key[0] or 0), int(number), numerics)
            with EXACT.context():
                inputs: list[Any] = [np.asarray(x[rows], numerics.compute)]
                out = np.asarray(stage.run(inputs, params, self.config, case.key[0], numerics, **changes))
            if found is None:
                found = np.zeros((*case.experts.shape, out.shape[-1]))
            found[rows] = out
        assert found is not None
        return found

    def expert(self, layer: int, number: int, numerics: Numerics = EXACT) -> Expert:
        """The parameters of one expert, float64 or as the engine holds them."""
        if (layer, number) not in self._experts:
            views = self.engine.checkpoint.expert(layer, number)
            with EXACT.context():
                self._experts[layer, number] = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), views)
        exact = self._experts[layer, number]
        if numerics is EXACT:
            return exact
        narrow, names = _narrowed(exact, numerics), vars(expert_names(layer, number))
        if not self.q8:
            return narrow
        return Expert(**{field: self._weight(w, names[field]) for field, w in vars(narrow).items()})


def _narrowed(params: Any, numerics: Numerics) -> Any:
    """All parameters as these numerics hold them, in one program: to start one for each takes longer than most need."""
    with EXACT.context():
        return _cast_all(params, numerics.compute)


@partial(jax.jit, static_argnums=1)
def _cast_all(params: Any, dtype: np.dtype[Any]) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), params)
