"""A stage computed from what is given for it: exactly, with an engine's roundings, or in NumPy where it is small."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxref.activations import Weight, activation_of
from jaxref.precision import NUMERICS, Numerics
from jaxref.stages import POSITIONS, STAGES, TOKENS
from oracle.case import INDICES, Case, Whole
from oracle.variants import variant_of
from weights import Checkpoint, Expert
from weights.params import expert_names, layer_names

EXACT = NUMERICS["float64"]
# Numbers that a stage reads; with more of them JAX is the faster one.
SMALL = 1 << 20


class Runner:
    """Computes stages of one checkpoint, a layer at a time. `numerics` are an engine's: of a dtype, or q8."""

    def __init__(self, checkpoint: Checkpoint, numerics: str) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.q8 = numerics == "q8"
        self.emulated: Numerics = NUMERICS["float32" if self.q8 else numerics]
        self._experts: dict[tuple[int, int], Expert] = {}
        self._params: Any = None
        self._rounded: Any = None
        self._held: dict[str, np.ndarray] = {}  # of `_params`, by field
        self._layer: int | None = -1

    def enter(self, layer: int | None, params: Any) -> None:
        """Go on to a layer (None: the whole model) with its parameters in float64."""
        self._layer, self._params, self._rounded, self._experts, self._held = layer, params, None, {}, {}

    def weight(self, params: Any, field: str) -> np.ndarray:
        """A parameter in NumPy; those of the present layer are turned into that once."""
        if params is not self._params:
            return np.asarray(getattr(params, field))
        if field not in self._held:
            self._held[field] = np.asarray(getattr(params, field))
        return self._held[field]

    def exact(self, case: Case, **changes: Any) -> np.ndarray:
        """The stage in float64. `changes` replace its settings."""
        return self._run(case, EXACT, case.params, **changes)

    def emulate(self, case: Case, **changes: Any) -> np.ndarray:
        """The stage with the engine's numerics: parameters, inputs and output rounded, activations too for q8."""
        if self._rounded is None:
            self._rounded = self._round(case.params)
        return self._run(case, self.emulated, self._rounded, **changes)

    def followed(self, case: Case) -> np.ndarray:
        """`exact` for those who ask often: JAX takes longer to start a small stage than NumPy to compute it."""
        function, stage = variant_of(case.stage), STAGES[case.stage]
        if function is None or stage.per_expert or sum(x.size for x in case.inputs) > SMALL:
            return self.exact(case)
        w = {field: self.weight(case.params, field) for field in stage.params}
        with np.errstate(all="ignore"):
            return function(list(case.inputs), w, stage.settings(self.config, case.key[0] or 0))

    def _round(self, params: Any) -> Any:
        narrow = _narrowed(params, self.emulated)
        if not self.q8:
            return narrow
        whole = isinstance(narrow, Whole)
        names = {"head": self.checkpoint.head_name} if whole else vars(layer_names(self.config, self._layer or 0))
        wrapped = {
            field: self._weight(value, names[field])
            for field, value in vars(narrow).items()
            if field in names and field != "experts" and value is not None and value.ndim > 1
        }
        return narrow.replace(**wrapped)

    def _weight(self, values: Any, name: str) -> Any:
        kind = activation_of(self.checkpoint, name)
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
                inputs: list[Any] = [_padded(np.asarray(x[rows], numerics.compute))]
                out = np.asarray(stage.run(inputs, params, self.config, case.key[0], numerics, **changes))
                out = out[: len(rows[0])]
            if found is None:
                found = np.zeros((*case.experts.shape, out.shape[-1]))
            found[rows] = out
        assert found is not None
        return found

    def expert(self, layer: int, number: int, numerics: Numerics = EXACT) -> Expert:
        """The parameters of one expert, float64 or as the engine holds them."""
        if (layer, number) not in self._experts:
            views = self.checkpoint.expert(layer, number)
            with EXACT.context():
                self._experts[layer, number] = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), views)
        exact = self._experts[layer, number]
        if numerics is EXACT:
            return exact
        narrow, names = _narrowed(exact, numerics), vars(expert_names(layer, number))
        if not self.q8:
            return narrow
        return Expert(**{field: self._weight(w, names[field]) for field, w in vars(narrow).items()})


def _padded(x: np.ndarray) -> np.ndarray:
    """Rows of zeros after these, up to 8, 16, 32, ...: each number of rows is a program of its own to compile."""
    rows = max(8, 1 << (len(x) - 1).bit_length())
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def _narrowed(params: Any, numerics: Numerics) -> Any:
    """All parameters as these numerics hold them, in one program: to start one for each takes longer than most need."""
    with EXACT.context():
        return _cast_all(params, numerics.compute)


@partial(jax.jit, static_argnums=1)
def _cast_all(params: Any, dtype: np.dtype[Any]) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), params)
