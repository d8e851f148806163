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

from jaxref.stages import STAGES, keys_of
from oracle.explain import Cause, Explained, explain
from tests.conftest import prompt
from tests.oracle.standin import FAULTS, Planted, run, struck_stages, write
from weights import Checkpoint, Config, open_checkpoint
from weights.tiny import tiny_config, write_random

COUNT = 23
LAYER = 2


@dataclass(frozen=True)
class Outcome:
    """One planted fault: which stages were struck and found, and what was said of each."""

    fault: str
    arch: str
    dtype: str
    layer: int | None
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


class Models:
    """Tiny checkpoints by architecture, changes and weights, made at first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], Checkpoint]] = {}

    def get(self, arch: str, planted: Planted) -> tuple[dict[str, Any], dict[str, np.ndarray], Checkpoint]:
        """config.json, tensors and the checkpoint."""
        key = f"{arch} {sorted(planted.config.items(), key=str)} {planted.weights}"
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
    layer: int | None,
    names: list[str] | None = None,
    lost: tuple[str, ...] = (),
) -> Iterator[Outcome]:
    """All faults that this architecture can have, in one layer or (None) in all, in trees without the `lost` stages."""
    models, tokens = Models(root), prompt(COUNT, 272)
    for planted in FAULTS.values():
        if arch not in planted.archs or dtype not in planted.dtypes or (names and planted.name not in names):
            continue
        raw, weights, checkpoint = models.get(arch, planted)
        where = {layer} if planted.per_layer and layer is not None else None
        trace = run(raw, weights, tokens, dtype, {planted.name: where})
        with TemporaryDirectory(dir=root) as folder:
            write(Path(folder), {key: value for key, value in trace.items() if key[1] not in lost})
            told: Explained = explain(checkpoint, folder, tokens, numerics=SHORT[dtype])
        if where is None and planted.per_layer:
            counts = Counter(stage for _, stage in trace if stage in planted.stages)
            # One layer alone has no neighbour.
            struck = {stage for stage, count in counts.items() if count > 1 or planted.cause != "weight_neighbour"}
        else:
            struck = {stage for _, stage in struck_stages(planted, trace, layer if planted.per_layer else None)}
        found = {fault.stage for fault in told.found.faults}
        shown = _shown(struck, set(lost), checkpoint.config)
        yield Outcome(planted.name, arch, dtype, layer, shown, found, told.causes, planted, lost)


def _shown(struck: set[str], lost: set[str], config: Config) -> set[str]:
    """The stages that are there and show what is wrong in these: these themselves, and for lost ones the next."""
    found = set(struck)
    for key in keys_of(config):
        above = {name[1] for name in STAGES[key[1]].upstream(config, key[0]) if not isinstance(name, str)}
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
    parser.add_argument("layer", nargs="?", default=str(LAYER), help="a layer's number, or all")
    parser.add_argument("fault", nargs="*", help="names of faults; all of them by default")
    parser.add_argument("--without", default="", help="stages that the trees lack, by commas: attn_scores,attn_softmax")
    asked = parser.parse_args()
    layer = None if asked.layer == "all" else int(asked.layer)
    with TemporaryDirectory() as root:
        lost = tuple(filter(None, asked.without.split(",")))
        print(table(list(sweep(Path(root), asked.arch, asked.dtype, layer, asked.fault or None, lost))))


if __name__ == "__main__":
    main()
