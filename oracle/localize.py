"""Each stage's own error: what it makes of the engine's own inputs, free of what it inherited."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxref.model import Pieces, Place, Routing, decoder_layer
from jaxref.reader import Reader
from jaxref.stages import STAGES, Key
from oracle import routing
from oracle.engine_tree import EngineTree, Value
from oracle.measure import LAYOUT_GAIN
from oracle.replay import EXACT, INDICES, Case, Replay, Unknown, Whole, rows_at
from oracle.trees import ordered
from weights import Checkpoint, UserError

# A stage is faulty where its local error is more than so many times what the engine's roundings make of it.
MARGIN = 4.0
# Spacing of what files hold. A float32 sum of n terms in any order is off by about √n of it.
ULP = 2.0**-24
SUMS = {
    "qkv_matmul",
    "attn_scores",
    "attention",
    "attn_out",
    "ffn_gate",
    "ffn_up",
    "ffn_out",
    "moe_router_logits",
    "lm_head",
}
SUMS |= {
    "moe_expert_gate",
    "moe_expert_up",
    "moe_expert_out",
    "attn_norm",
    "ffn_norm",
    "final_norm",
    "q_norm",
    "k_norm",
}
ROPE = {"q_post_rope", "k_post_rope"}
# Norms, whose whole rows a wrong eps scales: by less than half precision rounds one value, but all of them alike.
DRIFTING = {"attn_norm", "ffn_norm", "final_norm"}
DRIFT = 0.125  # of the floor


@dataclass(frozen=True)
class Local:
    """One stage of one layer. `local` and `accumulated` are relative L2; `limit` what `local` may be.

    `inherited` is the greatest accumulated error among its inputs; `drift` a scale that all rows share; `bad` counts
    values that are NaN or infinite here alone; `wrong` describes a wrong choice of experts; `where` the worst token, head, channel or expert.
    """

    key: Key
    local: float
    floor: float
    limit: float
    accumulated: float | None = None
    inherited: float | None = None
    bad: int = 0
    drift: float = 0.0
    wrong: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    through: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def faulty(self) -> bool:
        """Whether the stage itself is wrong."""
        return self.bad > 0 or self.wrong is not None or not self.local <= self.limit or self.drifting

    @property
    def drifting(self) -> bool:
        """Whether rows are scaled by less than rounding hides in one value, but all alike."""
        return abs(self.drift) > DRIFT * self.floor

    @property
    def amplification(self) -> float | None:
        """Accumulated error out over accumulated error in."""
        return self.accumulated / self.inherited if self.accumulated is not None and self.inherited else None


@dataclass(frozen=True)
class Fault:
    """The same stage wrong in some layers; `spared` are those where it was replayed and is right."""

    stage: str
    layers: tuple[int | None, ...]
    spared: tuple[int | None, ...]
    worst: Local


@dataclass
class Found:
    """What `localize` found, in computation order."""

    engine: EngineTree
    numerics: str
    locals: list[Local]
    unknown: dict[Key, str]
    notes: list[str]

    @property
    def faults(self) -> list[Fault]:
        """Stages that are wrong, each once, in computation order."""
        found = []
        for stage in STAGES:
            rows = [row for row in self.locals if row.key[1] == stage]
            bad = [row for row in rows if row.faulty]
            if bad:
                worst = max(bad, key=lambda row: (row.bad, row.local if math.isfinite(row.local) else math.inf))
                spared = tuple(row.key[0] for row in rows if not row.faulty)
                found.append(Fault(stage, tuple(row.key[0] for row in bad), spared, worst))
        first = {row.key: place for place, row in enumerate(self.locals)}
        return sorted(found, key=lambda fault: first[fault.layers[0], fault.stage])

    @property
    def verdict(self) -> str:
        """ "clean", "faulty" or "incomplete"."""
        return "faulty" if any(row.faulty for row in self.locals) else "incomplete" if self.unknown else "clean"

    @property
    def exit_code(self) -> int:
        """0 clean, 1 faulty, 2 incomplete."""
        return {"clean": 0, "faulty": 1, "incomplete": 2}[self.verdict]


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
    floor. Raises `UserError` for trees that do not fit the model.
    """
    engine = EngineTree(folder, checkpoint, tokens, positions)
    if not engine.keys:
        raise UserError(f"{folder}: holds no stage of this model")
    job = _Job(engine, engine.numerics(numerics), visit)
    if hf is not None:
        job.yardstick = Replay(EngineTree(hf, checkpoint, engine.tokens, role="yardstick"), job.numerics)
    return job.run(progress)


class _Job:
    """One run of `localize`."""

    def __init__(self, engine: EngineTree, numerics: str, visit: Visit | None) -> None:
        self.engine, self.numerics, self.visit = engine, numerics, visit
        self.replay = Replay(engine, numerics)
        self.yardstick: Replay | None = None
        self.locals: list[Local] = []
        self.unknown: dict[Key, str] = {}
        self._errors: dict[Key, float] = {}
        self._hidden: Any = None
        self._head_major: set[str] = set()

    def run(self, progress: Callable[[int], None]) -> Found:
        keys = ordered(set(self.engine.keys))
        deepest = max((key[0] for key in keys if key[0] is not None), default=-1)
        whole = any(key[0] is None for key in keys)
        layers = range(self.engine.config.num_hidden_layers if whole and self._chains() else deepest + 1)
        with EXACT.context(), Reader(self.engine.checkpoint, EXACT, None, lambda text: None) as reader:
            if self.engine.tokens is not None:
                self._hidden = reader.embed(self.engine.tokens)
            for layer, params in enumerate(reader.ahead(partial(reader.layer, i) for i in layers)):
                self._layer(layer, params, [key for key in keys if key[0] == layer], reader)
                del params
                progress(layer)
            if whole:
                reader.forget()
                self._whole([key for key in keys if key[0] is None])
        notes = self.engine.notes + [f"{stage} lies head-major, and was read so" for stage in sorted(self._head_major)]
        return Found(self.engine, self.numerics, self.locals, self.unknown, notes)

    def _chains(self) -> bool:
        """Whether the last hidden state is missing, so that it has to be computed."""
        return (self.engine.config.num_hidden_layers - 1, "post_ffn_residual") not in self.engine.tree.files

    def _layer(self, layer: int, params: Any, keys: list[Key], reader: Reader) -> None:
        if layer == 0:
            self._embedding(params, [key for key in keys if key[1] == "embedding"])
        self._enter(layer, params)
        reference = self._reference(layer, params, reader)
        for key in keys:
            if key[1] != "embedding":
                self._stage(key, reference.get(key[1]))
        # The next layer may have to begin here.
        if (layer, "post_ffn_residual") not in self.engine.tree.files:
            self.replay.value((layer, "post_ffn_residual"))

    def _enter(self, layer: int | None, params: Any) -> None:
        self.replay.enter(layer, params)
        if self.yardstick is not None:
            self.yardstick.enter(layer, params)

    def _embedding(self, layer: Any, keys: list[Key]) -> None:
        """Only the rows of the prompt's tokens are read; ids become places in them."""
        tokens = self.engine.tokens
        if tokens is None:
            for key in keys:
                self.unknown[key] = "the token ids are not known (--tokens or --prompt)"
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

    def _reference(self, layer: int, params: Any, reader: Reader) -> dict[str, np.ndarray]:
        """Every stage of the truth, where the tokens are known."""
        if self._hidden is None:
            return {}
        count, found = self.engine.count, {}
        experts = Routing(partial(_experts, self.replay, layer), np.arange(count))
        pieces = decoder_layer(
            params, self._hidden, jnp.arange(count), Place(self.engine.config, layer, EXACT), experts
        )
        self._hidden = _collect(pieces, found)
        return {
            stage: np.concatenate(parts, axis=1 if stage.startswith("attn_s") else 0) for stage, parts in found.items()
        }

    def _whole(self, keys: list[Key]) -> None:
        checkpoint = self.engine.checkpoint
        norm = jnp.asarray(np.asarray(checkpoint.norm(), np.float64))
        self._enter(None, Whole(norm=norm))
        truth = None
        if self._hidden is not None:
            case = Case(
                (None, "final_norm"), (np.asarray(self._hidden),), tuple(range(self.engine.count)), Whole(norm=norm)
            )
            truth = self.replay.exact(case)
        for key in (key for key in keys if key[1] == "final_norm"):
            self._stage(key, truth)
        if (None, "lm_head") in keys:
            self._head(norm, truth)

    def _head(self, norm: Any, truth: np.ndarray | None) -> None:
        """The head is widened as a whole only in what is left of the memory; its rows are a matrix like others."""
        checkpoint = self.engine.checkpoint
        before = self.replay.value((None, "final_norm"))
        head = jnp.asarray(np.asarray(checkpoint.tensor(checkpoint.head_name), np.float32))
        self._enter(None, Whole(norm=norm, head=head))
        self.replay.remember((None, "final_norm"), before)
        logits = None
        own = self.engine.value((None, "lm_head"))
        if truth is not None and own is not None:
            case = Case((None, "lm_head"), (truth[list(own.positions)],), own.positions, Whole(norm=norm, head=head))
            logits = np.zeros((self.engine.count, self.engine.config.vocab_size))
            logits[list(own.positions)] = self.replay.exact(case)
        self._stage((None, "lm_head"), logits)

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
            self._keep(
                Local(key, math.inf, 0.0, MARGIN * self._noise(key, at), wrong=words, through=through), case, engine
            )
            return
        engine = self._put_in_order(key, case, own, engine, exact)
        self._keep(self._judged(case, engine, exact, truth), case, engine)

    def _judged(self, case: Case, engine: np.ndarray, exact: np.ndarray, truth: np.ndarray | None) -> Local:
        """The stage's own error beside what rounding makes of it, and what it inherited."""
        key, at, stage = case.key, case.positions, case.stage
        emulated = self.replay.emulate(case)
        floor = max(distance(stage, emulated, exact, at), self._noise(key, at))
        accumulated = None
        if truth is not None:
            rows = truth if truth.shape == exact.shape else np.take(truth, list(at), axis=STAGES[stage].row_axis)
            if rows.shape == engine.shape:
                accumulated = self._errors[key] = distance(stage, engine, rows, at)
        inherited = [self._errors[k] for k in STAGES[stage].upstream(self.engine.config, key[0]) if k in self._errors]
        finite = np.isfinite(exact) & np.isfinite(emulated) & visible(stage, exact, at)
        row = Local(
            key,
            distance(stage, engine, exact, at),
            floor,
            MARGIN * floor,
            accumulated,
            max(inherited, default=None),
            int((~np.isfinite(engine) & finite).sum()),
            drift=drift(engine, emulated) if stage in DRIFTING and self.numerics == "float16" else 0.0,
            through=case.through,
        )
        return replace(row, where=worst(stage, engine, exact, at, self.engine.dims)) if row.faulty else row

    def _noise(self, key: Key, at: tuple[int, ...]) -> float:
        """What another order of sums or another way to the angles does, whatever the emulation found."""
        width = max(self.engine.dims[letter] for letter in "DFhHM") if key[1] in SUMS else 1
        noise = ULP * math.sqrt(width)
        if key[1] in ROPE:
            noise += ULP * max(at)
        if self.yardstick is not None and (own := self._yardstick_error(key)) is not None:
            noise = max(noise, own)
        return noise

    def _yardstick_error(self, key: Key) -> float | None:
        assert self.yardstick is not None
        if key not in self.yardstick.engine.tree.files or key[1] == INDICES:
            return None
        case, own = self.yardstick.case(key), self.yardstick.value(key)
        if isinstance(case, Unknown) or isinstance(own, Unknown):
            return None
        at = tuple(p for p in case.positions if p in set(own.positions))
        return distance(key[1], rows_at(own, at, key[1]), self.yardstick.exact(narrowed(case, at)), at) if at else None

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

    def _keep(self, row: Local, case: Case, engine: np.ndarray) -> None:
        self.locals.append(row)
        if row.faulty and self.visit is not None:
            self.visit(self.replay, case, row, engine)


def _experts(replay: Replay, layer: int, ids: list[int]) -> Iterator[Any]:
    return (replay.expert(layer, number) for number in ids)


def _collect(pieces: Pieces, found: dict[str, list[np.ndarray]]) -> Any:
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        found.setdefault(piece.stage, []).append(np.asarray(piece.value, np.float64))


def narrowed(case: Case, at: tuple[int, ...]) -> Case:
    """The case at fewer positions."""
    if at == case.positions:
        return case
    from oracle.replay import WHOLE

    place = [case.positions.index(p) for p in at]
    inputs = []
    for index, x in enumerate(case.inputs):
        rows = (case.stage, index) not in WHOLE and not (case.stage == "attn_softmax" and index == 2)
        axis = 1 if x.ndim == 3 and case.stage in ("attn_softmax", "attention") else 0
        inputs.append(np.take(x, place, axis=axis) if rows else x)
    experts = None if case.experts is None else case.experts[place]
    return Case(case.key, tuple(inputs), at, case.params, experts, case.through)


def visible(stage: str, x: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """What is comparable: of the raw scores the causal triangle."""
    if stage != "attn_scores":
        return np.ones(x.shape, bool)
    return np.broadcast_to(np.arange(x.shape[-1]) <= np.asarray(at)[:, None], x.shape)


def distance(stage: str, test: np.ndarray, exact: np.ndarray, at: tuple[int, ...]) -> float:
    """Relative L2 over what is comparable and finite in both; infinite for other shapes."""
    if test.shape != exact.shape:
        return math.inf
    with np.errstate(all="ignore"):
        keep = np.isfinite(test) & np.isfinite(exact) & visible(stage, exact, at)
        difference = np.linalg.norm(np.where(keep, test - exact, 0.0))
        size = np.linalg.norm(np.where(keep, exact, 0.0))
    return float(difference / size) if size else (math.inf if difference else 0.0)


def drift(test: np.ndarray, exact: np.ndarray) -> float:
    """The scale between rows, less one: a mean over rows, in which the rounding of single values averages out."""
    with np.errstate(all="ignore"):
        rows = (test * exact).sum(axis=1) / np.square(exact).sum(axis=1) - 1
    found = float(rows[np.isfinite(rows)].mean()) if np.isfinite(rows).any() else 0.0
    # Few values do not average it out.
    return found if test.size >= 1024 else 0.0


def worst(stage: str, test: np.ndarray, exact: np.ndarray, at: tuple[int, ...], dims: Any) -> dict[str, Any]:
    """Where the error lies: the worst token, head (or channel, or expert's rank), and how many of them are wrong."""
    with np.errstate(all="ignore"):
        keep = np.isfinite(exact) & visible(stage, exact, at)
        d = np.where(keep, np.nan_to_num(test - exact, nan=np.inf, posinf=np.inf), 0.0)
        r = np.where(keep, exact, 0.0)
    axes = STAGES[stage].axes
    if axes[0] == "H":
        groups = {"token": (d.swapaxes(0, 1), r.swapaxes(0, 1)), "head": (d, r)}
    else:
        groups = {"token": (d, r)}
        width = dims["h"] if axes[-1] in ("Hh", "Kh", "(H+2K)h") else 1
        name = "head" if width > 1 else "rank" if len(axes) == 3 else "channel"
        parts = [x.swapaxes(0, 1) if len(axes) == 3 else x.reshape(len(x), -1, width).swapaxes(0, 1) for x in (d, r)]
        groups[name] = (parts[0], parts[1])
    found: dict[str, Any] = {}
    for name, (x, y) in groups.items():
        errors = _group_errors(x, y)
        place = int(errors.argmax())
        found[name] = at[place] if name == "token" else place
        found[f"{name}_rel_l2"] = float(errors[place])
        # A group counts as wrong where it holds more than a hundredth of the worst one's error.
        found[f"{name}s_wrong"] = int((errors > errors[place] / 100).sum())
        found[f"{name}s"] = len(errors)
    return found


def _group_errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        flat = [np.linalg.norm(v.reshape(len(v), -1), axis=1) for v in (x, y)]
        return np.nan_to_num(
            flat[0] / np.maximum(flat[1], 1e-3 * np.linalg.norm(y) / math.sqrt(len(y)) + 1e-300), nan=np.inf
        )
