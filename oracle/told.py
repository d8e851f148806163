"""What a person and a machine read of `localize` and `explain`: a map, the faults, JSON records, one sentence."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxref.stages import STAGES
from oracle.explain import MISREAD, Cause, Explained
from oracle.floor import MARGIN
from oracle.local import Fault, Found, Local
from oracle.output import legible
from oracle.report import SHORT, WIDTH, print_wrapped
from oracle.sentence import many
from oracle.trees import path_of


def print_told(told: Explained) -> None:
    """The map, a block a fault, and the sentence, at 80 columns or as wide as the terminal is."""
    out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    found = told.found
    out.print(
        Text(f"engine {legible(str(found.engine.tree.folder))}, replayed in float64; its numerics: {found.numerics}")
    )
    out.print()
    for line in _map(found):
        out.print(line, soft_wrap=True)
    print_wrapped(out, _legend(found), 0)
    out.print()
    for fault in found.faults:
        for line in _block(fault, found, [cause for cause in told.causes if cause.stage == fault.stage]):
            print_wrapped(out, line, 12)
    for line in _rest(found):
        print_wrapped(out, line, 2)
    print_wrapped(out, sentence(told), 2)


def _map(found: Found) -> Iterator[Text]:
    """One row a layer, one column a stage."""
    rows = {row.key: row for row in found.locals}
    stages = [name for name in STAGES if any(key[1] == name for key in (*rows, *found.unknown))]
    yield Text("layer " + " ".join(SHORT.get(name, name[:2]) for name in stages), style="bold")
    for layer in sorted({key[0] for key in (*rows, *found.unknown)}, key=lambda n: (n is None, n or 0)):
        line = Text(f"{'model' if layer is None else layer:>5} ")
        for name in stages:
            key = (layer, name)
            mark, style = _mark(rows[key]) if key in rows else ("?", "yellow") if key in found.unknown else ("", "")
            line.append(f"{mark:>2} ", style=style)
        line.rstrip()
        yield line
    yield Text()


def _legend(found: Found) -> str:
    there = {key[1] for key in (*(row.key for row in found.locals), *found.unknown)}
    stages = ", ".join(f"{SHORT.get(name, name[:2])} {name}" for name in STAGES if name in there)
    tainted = ", n: not finite because its inputs are not" if any(mark_of(row) == "n" for row in found.locals) else ""
    marks = f".: what its inputs give, ~: the same through computed stages, X: faulty{tainted}, ?: not replayed"
    return f"{marks}. {stages}."


def mark_of(row: Local) -> str:
    """The letter of a stage in the map."""
    if row.faulty:
        return "X"
    return "n" if row.tainted else "~" if row.through or row.past else "."


_STYLES = {"X": "bold red", "n": "red", "~": "cyan", ".": "green"}


def _mark(row: Local) -> tuple[str, str]:
    return mark_of(row), _STYLES[mark_of(row)]


def layers_in_words(layers: Sequence[int | None], total: int) -> str:
    """`all 28 layers`, `layers 3, 5-7`, `the model`."""
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return "once in the model"
    if len(numbers) == total > 1:
        return f"all {total} layers"
    parts, start = [], numbers[0]
    for before, layer in zip(numbers, [*numbers[1:], None], strict=True):
        if layer != before + 1:
            parts.append(str(start) if start == before else f"{start}-{before}")
            start = layer if layer is not None else 0
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def _named(fault: Fault) -> str:
    """`qkv_bias in layer 2`, and of a stage of the whole model its name alone."""
    whole = all(layer is None for layer in fault.layers)
    return fault.stage if whole else f"{fault.stage} in {layers_in_words(fault.layers, fault.count)}"


def _block(fault: Fault, found: Found, causes: list[Cause]) -> Iterator[str]:
    worst, count = fault.worst, fault.count
    spared = f"; right in {layers_in_words(fault.spared, -1)}" if fault.spared else ""
    spared += f"; not finite in {layers_in_words(fault.tainted, -1)}, as its inputs there" if fault.tainted else ""
    yield f"{_named(fault).replace(' in ', ', ', 1)}{spared} ({STAGES[fault.stage].meaning})"
    place = path_of(worst.key)
    if worst.bad:
        yield f"  values    {worst.not_finite} at {place}"
    elif worst.wrong is None:
        yield f"  local     {worst.local:.3g} at {place}; its rounding makes {worst.floor:.2g} of it"
    if worst.drifting and worst.local <= worst.limit and not worst.bad:
        yield f"  scale     all rows by {1 + worst.drift:.6f}"
    if worst.accumulated is not None:
        yield f"  in all    {worst.accumulated:.3g} from the truth{_came_in(worst)}"
    if worst.where:
        yield f"  worst     {where_in_words(worst.where)}"
    if worst.through:
        yield f"  through   {_through(worst)}"
    misread = found.misread(worst)
    if not causes and (worst.wrong or misread):
        yield f"  wrong     {misread.words if misread else worst.wrong}"
    for cause in causes:
        at = "" if len(causes) == 1 else f" ({layers_in_words(cause.layers, count)})"
        if cause.explanation is None:
            yield f"  hint      {cause.hint}{at}"
            continue
        same = f", or, the same here, {' or '.join(cause.explanation.same)}" if cause.explanation.same else ""
        yield f"  because   {cause.explanation.hypothesis}: {cause.explanation.text}{same}{at}"
        place = "there" if cause.explanation.hypothesis == MISREAD else "with it"
        yield f"            {place} {cause.explanation.residual:.2g} is left"


def _through(row: Local) -> str:
    """What was computed on the way, the layers before in a word."""
    here, before = list[str](), set[int]()
    for name in row.through:
        folder, _, stage = name.rpartition("/")
        if folder in ("", f"layer-{row.key[0]}"):
            here.append(stage)
        else:
            before.add(int(folder.removeprefix("layer-")))
    parts = [", ".join(here), f"stages of {layers_in_words(sorted(before), -1)}" if before else ""]
    return f"{' and '.join(filter(None, parts))}: missing in the tree, computed; the fault may be there"


def _came_in(row: Local) -> str:
    """The error of the inputs; how much it grew only where it, and not the stage's own error, is what came out."""
    if row.inherited is None:
        return ""
    grown = row.amplification and row.inherited > row.limit and row.local < 10 * row.inherited
    return f", {row.inherited:.3g} of it came in" + (f", {row.amplification:.3g} times" if grown else "")


def where_in_words(where: dict[str, Any]) -> str:
    """The worst token, head, channel or rank, and how many are wrong."""
    parts = []
    for name in ("token", "head", "channel", "rank"):
        if name in where:
            wrong, count = where[f"{name}s_wrong"], where[f"{name}s"]
            share = "alone" if wrong == 1 < count else f"{wrong} of {count} wrong"
            error = where[f"{name}_rel_l2"]
            size = f"{error:.3g}, " if math.isfinite(error) else ""
            parts.append(f"{name} {where[name]} ({size}{share})")
    return ", ".join(parts)


def _rest(found: Found) -> Iterator[str]:
    for reason, count in Counter(found.unknown.values()).items():
        first = path_of(next(key for key, why in found.unknown.items() if why == reason))
        yield f"not replayed: {first}{f' and {count - 1} others' if count > 1 else ''}: {reason}"
    through = sorted({name for row in found.locals for name in row.through})
    if through:
        more = f" and {len(through) - 4} others" if len(through) > 4 else ""
        yield f"computed, since the tree lacks them: {', '.join(through[:4])}{more}"
    past = list(dict.fromkeys(name for row in found.locals for name in row.past))
    if past:
        more = f" and {len(past) - 4} others" if len(past) > 4 else ""
        yield f"computed, since what was used is not what was dumped: {', '.join(past[:4])}{more}"
    notes = Counter(note for row in found.locals for note in row.notes)
    yield from (f"note: {note}" for note in (*found.notes, *notes))


def sentence(told: Explained) -> str:
    """One sentence that can be pasted into a bug report."""
    found = told.found
    config, count = found.engine.config, found.engine.count
    sizes = f"{many(config.num_hidden_layers, 'layer')}, {many(count, 'token')}"
    what = f"{config.model_type}, {sizes}, {found.numerics}"
    tree = found.engine.tree.folder.name or str(found.engine.tree.folder)
    if found.verdict == "incomplete":
        unknown = len(found.unknown)
        right = f"{many(len(found.locals), 'stage')} {'is' if len(found.locals) == 1 else 'are'} right"
        return f"incomplete: of {tree} {right}, {unknown} could not be replayed ({what})."
    if not found.faults:
        count = len(found.locals)
        each = "the one stage" if count == 1 else f"each of the {count} stages"
        return (
            f"clean: {each} of {tree} is what its own inputs give, within"
            f" {MARGIN:g} times the rounding of {found.numerics} ({what})."
        )
    first: dict[str, str] = {}  # by what is said of a cause, the stage of which it is said
    faults = "; ".join(_fault_in_words(fault, told, first) for fault in found.faults)
    dumps = all(found.misread(row) for row in found.locals if row.faulty)
    kind = "holds dumps that are not what was computed with" if dumps else "computes wrongly from its own inputs"
    return f"faulty: {tree} {kind}: {faults} ({what})."


def _fault_in_words(fault: Fault, told: Explained, first: dict[str, str]) -> str:
    """The stage, its error, and the cause, or the stage that has the same one; kept in `first`."""
    worst = fault.worst
    cause = next((c.explanation.text for c in told.causes if c.stage == fault.stage and c.explanation), None)
    misread = told.found.misread(worst)
    cause = misread.words if misread and cause is None else cause
    if cause and first.setdefault(cause, fault.stage) != fault.stage:
        cause = f"as {first[cause]}"
    size = f", {worst.local:.2g} where rounding makes {worst.floor:.1g}" if worst.wrong is None else ""
    size = f", {worst.not_finite}" if worst.bad else size
    return f"{_named(fault)}{size}{f' ({cause})' if cause else ''}"
