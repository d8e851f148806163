"""Every tensor that an engine holds beside the checkpoint's: `python -m oracle weight MODEL all FILE`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxref.one_file import open_one_file
from jaxref.show import progress_bar
from oracle.metrics import jsonable
from oracle.report import WIDTH, print_wrapped
from oracle.told import layers_in_words
from oracle.weight import Held, matrix_shape
from oracle.weight_parts import Part, Tensors, held_names, parts_of
from oracle.weight_told import MEANT, SCHEMA, Told, as_json, reasons, tell
from weights import Checkpoint, UserError
from weights.errors import brief, listed

SHOWN = 8  # names of one kind
_LAYER = re.compile(r"\b(?:layers|blk)\.(\d+)\.")


@dataclass(frozen=True)
class Wrong:
    """What is kept of a tensor that differs: not its values."""

    name: str
    stored_as: str
    relative_l2: float
    why: str


@dataclass
class Judged:
    """What was found of all tensors; of those that are the same or rounded how many there are of each kind."""

    same: Counter[str] = field(default_factory=Counter)
    wrong: list[Wrong] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # of another size
    unknown: list[str] = field(default_factory=list)  # names that are none of the model's
    missing: list[str] = field(default_factory=list)  # the model's that are not in the file
    stored: Counter[str] = field(default_factory=Counter)  # how many of each type were compared

    @property
    def exit_code(self) -> int:
        """1 where a tensor differs, 2 where one of the model's is not there, else 0."""
        return 1 if self.wrong or self.misfits else 2 if self.missing else 0


def run_all(checkpoint: Checkpoint, path: Path, *, json_wanted: bool) -> int:
    """Judge all tensors of a file by their names and print it; the exit code. Raises `UserError` as `open_one_file`."""

    def tell_each(told: Told) -> None:
        if json_wanted:
            print(json.dumps(as_json(told), allow_nan=False))

    given = open_one_file(path, wanted=held_names(checkpoint))
    with progress_bar(len(given), quiet=json_wanted, what="tensor") as progress:
        found = judge_all(checkpoint, given, str(path), tell_each, progress)
    if json_wanted:
        print(json.dumps(_summary(found), allow_nan=False))
    else:
        out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        for line in lines(found):
            print_wrapped(out, line, 12)
    return found.exit_code


def judge_all(
    checkpoint: Checkpoint,
    given: Tensors,
    where: str,
    heard: Callable[[Told], None] = lambda told: None,
    progress: Callable[[int], None] = lambda place: None,
) -> Judged:
    """Judge tensors by their names; `where` they are, for messages. `heard` has each verdict.

    Those whose names are none of the checkpoint's are not looked at. `progress` is called with the place of each that
    is done. Raises `UserError` where none is the checkpoint's.
    """
    found, seen = Judged(), set[str]()
    known = set(checkpoint.tensor_names)
    for place, name in enumerate(given):
        parts = list(parts_of(checkpoint, known, name, given))
        found.unknown += [part.name for part in parts if part.theirs not in known] if parts else [name]
        for part in parts:
            if part.theirs in known:
                seen.add(part.theirs)
                _judge(checkpoint, part, found, heard)
        progress(place)
    if not seen:
        raise UserError(f"{where}: no name in it is a tensor's of {checkpoint.name}, like {checkpoint.tensor_names[0]}")
    found.missing = sorted(known - seen)
    return found


def _judge(checkpoint: Checkpoint, given: Part, found: Judged, heard: Callable[[Told], None]) -> None:
    name, theirs, array = given.name, given.theirs, given.read()
    rows, width = matrix_shape(checkpoint.shape(theirs))
    if array.size != rows * width:
        found.misfits.append(f"{name} {list(array.shape)}, where MODEL has {list(checkpoint.shape(theirs))}")
        return
    told = tell(Held(checkpoint, theirs, array.reshape(rows, width)))
    stored = checkpoint.stored_as(theirs)
    found.stored[stored] += 1
    if told.left is None:
        why = " or ".join(reasons(told)) or "no reading that is known has the engine's values"
        found.wrong.append(Wrong(name, stored, told.apart.relative_l2, why))
    else:
        found.same[told.left] += 1
    heard(told)


def lines(found: Judged) -> Iterator[str]:
    """For people: what differs, grouped by cause; what is missing; how many are the same."""
    groups: dict[tuple[str, str], list[Wrong]] = defaultdict(list)
    for wrong in found.wrong:
        groups[wrong.stored_as, wrong.why].append(wrong)
    for (stored, why), group in groups.items():
        of = f"all {len(group)}" if len(group) == found.stored[stored] else f"{len(group)} of {found.stored[stored]}"
        worst = max(group, key=lambda wrong: wrong.relative_l2)
        yield f"differ: {of} in {stored}; relative L2 {worst.relative_l2:.3g} in {worst.name}"
        yield from (f"  tensors   {names}" for names in _by_layers([wrong.name for wrong in group]))
        yield f"  because   {why}"
    yield from (f"another size: {misfit}" for misfit in found.misfits[:SHOWN])
    if len(found.misfits) > SHOWN:
        yield f"another size: {len(found.misfits) - SHOWN} more"
    if found.unknown:
        yield f"not in MODEL: {len(found.unknown)}, {listed(map(brief, found.unknown[:SHOWN]))}"
    if found.missing:
        yield f"not in the file: {len(found.missing)}, first {found.missing[0]}"
    same = [f"{found.same[left]} {words}" for left, words in MEANT.items() if found.same[left]]
    differ = len(found.wrong) + len(found.misfits)
    yield f"{differ} differ, {len(found.missing)} missing" + "".join(f"; {words}" for words in same)


def _by_layers(names: list[str]) -> Iterator[str]:
    """Names that differ in their layer alone as one, with the layers."""
    layers: dict[str, list[int]] = defaultdict(list)
    for name in names:
        if (layer := _LAYER.search(name)) is None:
            layers[name] = []
        else:
            layers[f"{name[: layer.start(1)]}*{name[layer.end(1) :]}"].append(int(layer[1]))
    for name, at in list(layers.items())[:SHOWN]:
        yield f"{name}, {layers_in_words(sorted(at), 0)}" if at else name
    if len(layers) > SHOWN:
        yield f"and {sum(max(1, len(at)) for at in list(layers.values())[SHOWN:])} more"


def _summary(found: Judged) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "summary": True,
        "same": {left: found.same[left] for left in MEANT},
        "differ": len(found.wrong),
        "another_size": found.misfits,
        "unknown": found.unknown,
        "missing": found.missing,
        "worst_relative_l2": jsonable(max((wrong.relative_l2 for wrong in found.wrong), default=0.0)),
    }
