"""One faulty stage with all that a hypothesis about it may need: inputs, weights, the engine's other stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from jaxref.stages import STAGES
from oracle.blocks import Blocks, Read
from oracle.case import Case, rows_at
from oracle.deviations import drift, relative, visible
from oracle.engine_tree import Value
from oracle.replay import Replay
from oracle.stored import tensor_name
from oracle.variants import Switches, variant_of
from weights.names import layer_rows
from weights.params import expert_names

# So many tensors are kept while the variants of a stage are tried.
KEPT = 4
# get(field, layer, shift, read): a matrix of this or another layer; of an expert's stage that of the expert `shift` ids
# on. With `read`, what that makes of the blocks that it is stored in.
Get = Callable[..., np.ndarray]
Pick = Callable[[Get], np.ndarray]


class Bench:
    """Where hypotheses about one stage of one layer are tried. All arrays are float64.

    `shown`: whether `engine` are the engine's rows; of a stage that its tree lacks they are the right ones, and `seen`
    says how far from the truth those are of the stage that shows it. `every`: variants are wanted that the engine's
    rows speak against, too.
    """

    def __init__(
        self,
        replay: Replay,
        case: Case,
        engine: np.ndarray,
        *,
        shown: bool = True,
        seen: float | None = None,
        every: bool = False,
    ) -> None:
        self.shown, self._seen, self.every = shown, seen, every
        self.replay, self.case, self.engine = replay, case, engine
        self.config, self.layer, self.stage = replay.config, case.key[0], case.stage
        self.checkpoint = replay.engine.checkpoint
        self.row = STAGES[case.stage]
        self.settings: Switches = self.row.settings(self.config, self.layer or 0)
        self._tensors: dict[tuple[str, int | None], np.ndarray] = {}
        self._function = variant_of(case.stage)

    @cached_property
    def rounding_drift(self) -> float:
        """The scale that rounding alone gives all rows."""
        return drift(self.replay.emulate(self.case), self.run({}))

    @cached_property
    def seen(self) -> float:
        """The relative L2 of what is to be explained."""
        return self.error({}) if self._seen is None else self._seen

    @cached_property
    def shown_at(self) -> np.ndarray:
        """Where the engine's rows are finite and comparable."""
        return visible(self.stage, self.engine, self.case.positions) & np.isfinite(self.engine)

    @cached_property
    def lost(self) -> np.ndarray:
        """Where the engine's rows are not finite and should be."""
        lost = ~np.isfinite(self.engine) & visible(self.stage, self.engine, self.case.positions)
        return lost & np.isfinite(self.run({})) if lost.any() else lost

    @property
    def x(self) -> list[np.ndarray]:
        """The stage's inputs."""
        return list(self.case.inputs)

    def run(self, switches: Switches) -> np.ndarray:
        """The stage with switches. `x` among them replaces inputs by their places, `w` weights by their fields."""
        assert self._function is not None
        s = self.settings | switches
        x = [s.get("x", {}).get(i, value) for i, value in enumerate(self.x)]
        if self.row.per_expert:
            return self._run_experts(x, s)
        w = {field: self._weight(field, s.get("w", {}).get(field)) for field in self.row.params}
        return self._function(x, w, s)

    def error(self, switches: Switches) -> float:
        """How far the engine is from the stage with these switches: relative L2; infinite where they cannot be."""
        return self.apart(lambda: self.run(switches))

    def apart(self, run: Callable[[], np.ndarray]) -> float:
        """How far the engine is from these rows, whoever computes them; infinite where they cannot be computed."""
        try:
            with np.errstate(all="ignore"):
                found = run()
                if found.shape != self.engine.shape:
                    return float("inf")
                finite = np.isfinite(found)
                if not finite[self.shown_at].all() or finite[self.lost].any():
                    return float("inf")  # the distance is over what is finite in both
                stored = found.astype(self.replay.emulated.compute).astype(np.float64)
                # A value that the engine rounded once is that of the right variant rounded, to the bit.
                kept = (found, self.shown_at), (stored, self.shown_at & np.isfinite(stored))
                return min(relative(self.engine, x, keep) for x, keep in kept)
        except (TypeError, ValueError, IndexError, KeyError, FloatingPointError):
            return float("inf")  # shapes that do not go together: this is not what the engine did

    def matrix(self, field: str) -> np.ndarray:
        """The stage's own tensor of this field, of an expert's stage that of the first expert of the first row."""
        if self.case.experts is None:
            return self.replay.weight(self.case.params, field)
        return np.asarray(getattr(self.replay.expert(self.layer or 0, int(self.case.experts.flat[0])), field))

    def _weight(self, field: str, pick: Pick | None) -> np.ndarray:
        return self.replay.weight(self.case.params, field) if pick is None else pick(partial(self._get, field))

    def _get(
        self, field: str, name: str | None = None, layer: int | None = None, shift: int = 0, read: Read | None = None
    ) -> np.ndarray:
        return self.tensor(name or field, layer) if read is None else read(self.blocks(name or field))

    def tensor(self, field: str, layer: int | None = None) -> np.ndarray:
        """A tensor of this layer (another one's, the whole model's) by its field, as float64; the last few are kept.

        They are kept here: what `functools` keeps for a method would hold them until the garbage collector comes.
        """
        key = (field, layer)
        if key not in self._tensors:
            found = self._tensor(field, layer)
            if len(self._tensors) == KEPT:
                del self._tensors[next(iter(self._tensors))]
            self._tensors[key] = found
        return self._tensors[key]

    def _tensor(self, field: str, layer: int | None) -> np.ndarray:
        return np.asarray(self.checkpoint.tensor(self._name(field, layer)), np.float64)

    def _name(self, field: str, layer: int | None = None, expert: int | None = None) -> str:
        """A tensor in the checkpoint; of an expert's stage by default the first expert's of the first row."""
        if expert is None and self.case.experts is not None:
            expert = int(self.case.experts.flat[0])
        return tensor_name(self.checkpoint, self.layer if layer is None else layer, field, expert)

    def stored_as(self, field: str) -> str:
        """How the stage's own tensor is stored, for people; nothing of one that is a part of another."""
        return "" if self.row.per_expert and self.checkpoint.stacked else self.checkpoint.stored_as(self._name(field))

    def blocks(self, field: str, rows: slice | np.ndarray = slice(None), expert: int | None = None) -> Blocks:
        """Some rows of the stage's own tensor as they lie in a GGUF file."""
        name = self._name(field, expert=expert)
        return Blocks.of(self.checkpoint.stored_as(name), self.checkpoint.packed(name, rows))

    def _run_experts(self, x: list[np.ndarray], s: Switches) -> np.ndarray:
        experts, (field,) = self.case.experts, self.row.params
        assert experts is not None and self._function is not None and self.layer is not None
        rows = x[0] if x[0].ndim == 3 else np.broadcast_to(x[0][:, None], (*experts.shape, x[0].shape[-1]))
        pick = s.get("w", {}).get(field)
        found: np.ndarray | None = None
        for number in np.unique(experts):
            at = np.nonzero(experts == number)
            get = self._expert_get(field, int(number), s.get("shift", 0))
            out = self._function([rows[at]], {field: get() if pick is None else pick(get)}, s)
            found = np.zeros((*experts.shape, out.shape[-1])) if found is None else found
            found[at] = out
        assert found is not None
        return found

    def _expert_get(self, field: str, number: int, shift: int) -> Get:
        def get(
            name: str = field, layer: int | None = None, shift: int = shift, read: Read | None = None
        ) -> np.ndarray:
            expert = (number + shift) % self.config.num_experts
            if read is not None:
                return read(self.blocks(name, expert=expert))
            if layer is None:
                return np.asarray(getattr(self.replay.expert(self.layer or 0, expert), name))
            if not self.config.is_moe(layer):
                raise ValueError("no experts there")
            getattr(expert_names(layer, expert), name)
            return np.asarray(getattr(self.checkpoint.expert(layer, expert), name), np.float64)

        return get

    def value(self, stage: str, layer: int | None = None) -> np.ndarray | None:
        """The engine's rows of another stage at this one's positions; None where they cannot be had."""
        found = self.replay.value((self.layer if layer is None else layer, stage))
        if not isinstance(found, Value) or not set(self.case.positions) <= set(found.positions):
            return None
        return rows_at(found, self.case.positions, stage)

    def has(self, field: str, layer: int) -> bool:
        """Whether a layer has a tensor of this field."""
        return any(row.field == field for row in layer_rows(self.config, layer)) or (
            self.row.per_expert and self.config.is_moe(layer)
        )
