"""Every fault of the catalogue planted in the stand-in engine, localized and explained: how often that is right."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxref.stages import STAGES, inputs_of, keys_of
from oracle.explain import Cause, Explained, explain
from oracle.trees import path_of
from tests.conftest import prompt
from tests.oracle.standin import FAULTS, Planted, run, struck_stages
from tests.oracle.standin.place import Trace
from weights import Checkpoint, Config, open_checkpoint
from weights.tiny import tiny_config, write_random

COUNT = 23
LAYER = 2  # has one before it and one after it, and experts in a model of experts
# Layers that are alike in each model and have one before them; in one run each has a fault of its own.
LAYERS = {"qwen2": (1, 2, 3), "qwen3": (1, 2, 3), "qwen3_moe": (2, 3)}

Group = dict[Planted, int | None]  # what is planted in one run, and where: in a layer, or wherever it can be


@dataclass(frozen=True)
class Outcome:
    """One planted fault: which stages were struck and found, and what was said of each."""

    fault: str
    arch: str
    dtype: str
    layer: int | None  # None: all layers, or the whole model
    struck: set[str]
    found: set[str]
    causes: list[Cause]
    planted: Planted
    lost: tuple[str, ...] = ()

    @property
    def stage_right(self) -> bool:
        """Exactly the struck stages; of a tree that lacks some, none but those that show it."""
        return self.found <= self.struck and bool(self.found) if self.lost else self.struck == self.found

    @property
    def cause_right(self) -> bool:
        """The cause at each struck stage, or for what has no name no name at all."""
        return all(self.planted.cause in _names(c) for c in self.causes if c.stage in self.struck)

    @property
    def confident_and_wrong(self) -> bool:
        """A cause was named, and it is not the one."""
        return any(c.explanation and self.planted.cause not in _names(c) for c in self.causes)


def _names(cause: Cause) -> set[str | None]:
    """What is said: the hypothesis and those that are the same computation."""
    return {cause.explanation.hypothesis, *cause.explanation.same} if cause.explanation else {None}


def _model(planted: Planted) -> str:
    """What is another model's."""
    return f"{sorted(planted.config.items(), key=str)} {planted.weights}"


class Models:
    """Tiny checkpoints by architecture, changes and weights, made at first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], Checkpoint]] = {}

    def get(self, arch: str, planted: Planted) -> tuple[dict[str, Any], dict[str, np.ndarray], Checkpoint]:
        """config.json, tensors and the checkpoint."""
        key = f"{arch} {_model(planted)}"
        if key not in self._made:
            folder = self.root / str(len(self._made))
            raw = tiny_config(arch, None, 4, **planted.config)
            write_random(folder, raw, seed=3, dtype="float32")
            weights = load_file(folder / "model.safetensors")
            if planted.weights == "bfloat16":
                weights = {name: w.astype(ml_dtypes.bfloat16).astype(np.float32) for name, w in weights.items()}
                save_file(weights, folder / "model.safetensors")
            self._made[key] = raw, weights, open_checkpoint(folder)
        return self._made[key]


def sweep(
    root: Path,
    arch: str,
    dtype: str,
    layers: tuple[int, ...] | None,
    names: list[str] | None = None,
    lost: tuple[str, ...] = (),
) -> Iterator[Outcome]:
    """All faults that this architecture can have, in trees without the `lost` stages.

    One run has as many as there are `layers`, each in one of them, or one of the whole model; None: one, in all layers.
    What a fault strikes must show in its own layer, so that of several `layers` none may lose `post_ffn_residual`.
    """
    models = Models(root)
    asked = [p for p in FAULTS.values() if arch in p.archs and dtype in p.dtypes and (not names or p.name in names)]
    for group in _groups(asked, layers):
        yield from _outcomes(models, arch, dtype, group, lost)


def _groups(asked: list[Planted], layers: tuple[int, ...] | None) -> Iterator[Group]:
    by_model: dict[str, list[Planted]] = {}
    for planted in asked:
        by_model.setdefault(_model(planted), []).append(planted)
    for faults in by_model.values():
        inner = [planted for planted in faults if planted.per_layer and layers is not None]
        yield from ({planted: None} for planted in faults if planted not in inner)
        if layers is not None:
            runs = -(-len(inner) // len(layers))
            # Neighbours in the catalogue strike the same stage, and go into different runs.
            yield from (dict(zip(inner[i::runs], layers, strict=False)) for i in range(runs))


def _outcomes(models: Models, arch: str, dtype: str, group: Group, lost: tuple[str, ...]) -> Iterator[Outcome]:
    raw, weights, checkpoint = models.get(arch, next(iter(group)))
    tokens = prompt(COUNT, 272)
    faults = {planted.name: None if layer is None else {layer} for planted, layer in group.items()}
    trace = run(raw, weights, tokens, dtype, faults)
    if len(group) > 1 and not all(np.isfinite(values).all() for values in trace.values()):
        for planted, layer in group.items():  # nothing after NaN tells of another fault
            yield from _outcomes(models, arch, dtype, {planted: layer}, lost)
        return
    # In memory: a third of the time of a run went into the files of its tree.
    held = {path_of(key): np.float32(values) for key, values in trace.items() if key[1] not in lost}
    told: Explained = explain(checkpoint, held, tokens, numerics=SHORT[dtype])
    places = {planted: _places(planted, layer, trace) for planted, layer in group.items()}
    # What is found where nothing was planted is held against them all.
    alien = {key[0] for key in trace} - set().union(*places.values())
    for planted, layer in group.items():
        own = places[planted] | alien
        found = {row.key[1] for row in told.found.locals if row.faulty and row.key[0] in own}
        causes = [cause for cause in told.causes if own & set(cause.layers)]
        shown = _shown(_struck(planted, layer, trace), set(lost), checkpoint.config)
        yield Outcome(planted.name, arch, dtype, layer, shown, found, causes, planted, lost)


def _places(planted: Planted, layer: int | None, trace: Trace) -> set[int | None]:
    """The layers in which a fault may show; None: the whole model's stages."""
    if not planted.per_layer:
        return {0, None}
    return {layer} if layer is not None else {key[0] for key in trace}


def _struck(planted: Planted, layer: int | None, trace: Trace) -> set[str]:
    """The stages that a fault strikes."""
    if layer is not None or not planted.per_layer:
        return {stage for _, stage in struck_stages(planted, trace, layer)}
    counts = Counter(stage for _, stage in trace if stage in planted.stages)
    # One layer alone has no neighbour.
    return {stage for stage, count in counts.items() if count > 1 or planted.cause != "weight_neighbour"}


def _shown(struck: set[str], lost: set[str], config: Config) -> set[str]:
    """The stages that are there and show what is wrong in these: these themselves, and for lost ones the next."""
    found = set(struck)
    for key in keys_of(config):
        above = {name[1] for name in inputs_of(STAGES[key[1]], config, key[0]) if not isinstance(name, str)}
        if above & lost & found:
            found.add(key[1])
    return found - lost


SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def table(outcomes: list[Outcome]) -> str:
    """The confusion table: what was planted, what was said, and the rates."""
    lines = []
    for o in outcomes:
        if not (o.stage_right and o.cause_right):
            said = ", ".join(
                f"{c.stage}: {c.explanation.hypothesis if c.explanation else None} ({c.hint})" for c in o.causes
            )
            lines.append(
                f"{o.arch} {o.dtype} {o.layer} {o.fault}: stages {sorted(o.found)} for {sorted(o.struck)}; {said}"
            )
    total = len(outcomes)
    stages, causes = (sum(getattr(o, name) for o in outcomes) for name in ("stage_right", "cause_right"))
    wrong = sum(o.confident_and_wrong for o in outcomes)
    lines.append(
        f"{total} planted, stage right {stages / total:.1%}, cause right {causes / total:.1%}, wrong name {wrong}"
    )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Plant faults in a stand-in engine and see what explain says of them.")
    parser.add_argument("arch", nargs="?", default="qwen2", choices=["qwen2", "qwen3", "qwen3_moe"])
    parser.add_argument("dtype", nargs="?", default="float32", choices=SHORT)
    parser.add_argument("layer", nargs="?", default="each", help="a number, all, or each: several faults in one run")
    parser.add_argument("fault", nargs="*", help="names of faults; all of them by default")
    parser.add_argument("--without", default="", help="stages that the trees lack, by commas: attn_scores,attn_softmax")
    asked = parser.parse_args()
    layers = None if asked.layer == "all" else LAYERS[asked.arch] if asked.layer == "each" else (int(asked.layer),)
    with TemporaryDirectory() as root:
        lost = tuple(filter(None, asked.without.split(",")))
        print(table(list(sweep(Path(root), asked.arch, asked.dtype, layers, asked.fault or None, lost))))


if __name__ == "__main__":
    main()
