"""What `localize` and `explain` found as a sheet: own errors in the map, own and accumulated ones as lines."""

from __future__ import annotations

from jaxref.stages import STAGES
from oracle.explain import Explained
from oracle.local import Local
from oracle.page.sheet import Cell, Listing, Series, Sheet, Side
from oracle.sentence import named
from oracle.told import layers_in_words, mark_of, sentence, where_in_words

MARKS = {".": "what its own inputs give", "~": "the same through computed stages", "X": "faulty"}
MARKS |= {"n": "not finite because its inputs are not", "?": "not replayed"}
STATUS = {"X": "diverge", "n": "tie", "~": "tie", ".": "agree"}


def sheet_of_told(told: Explained) -> Sheet:
    """All that a page says of it."""
    found, faults = told.found, told.found.faults
    cells = [_cell(row, _because(told, row)) for row in found.locals]
    cells += [
        Cell(key, None, "?", "missing", {"status": "not replayed", "why": why}) for key, why in found.unknown.items()
    ]
    used = {cell.mark for cell in cells}
    tree = found.engine.tree
    manifest = {name: value for name, value in (tree.manifest or {}).items() if name != "files"} or None
    names = ", ".join(fault.stage for fault in faults)
    return Sheet(
        title=f"{tree.folder.name} on its own inputs",
        verdict={"clean": "clean", "faulty": f"faulty: {names}", "incomplete": "incomplete"}[found.verdict],
        status={"clean": "agree", "faulty": "diverge", "incomplete": "missing"}[found.verdict],
        sentence=sentence(told),
        cells=cells,
        marks={mark: words for mark, words in MARKS.items() if mark in used},
        facts={"numerics": found.numerics, "replayed": f"{len(found.locals)} stages, {len(found.unknown)} not"},
        lines=_lines(found.locals),
        listings=[_faults(told)] if faults else [],
        findings=found.notes,
        trees=[Side("engine", str(tree.folder), named(tree), manifest)],
        start=faults[0].worst.key if faults else None,
    )


def _because(told: Explained, row: Local) -> str | None:
    """What is known of why a stage of a layer is wrong."""
    layer, stage = row.key
    causes = [cause for cause in told.causes if cause.stage == stage and layer in cause.layers]
    return "; ".join(c.explanation.text if c.explanation else c.hint for c in causes) or None if row.faulty else None


def _cell(row: Local, because: str | None) -> Cell:
    mark = mark_of(row)
    details = {"stage": STAGES[row.key[1]].meaning}
    details |= {"because": because} if because else {}
    if row.bad:
        details["not finite"] = row.not_finite
    else:
        details["own error"] = f"{row.local:.3g}"
    details |= {"floor": f"{row.floor:.3g}", "limit": f"{row.limit:.3g}"}
    if row.accumulated is not None:
        details["accumulated"] = f"{row.accumulated:.3g}"
    if row.amplification is not None:
        details["amplification"] = f"{row.amplification:.3g}"
    if row.where:
        details["worst"] = where_in_words(row.where)
    if row.wrong:
        details["wrong"] = row.wrong
    if row.through:
        details["through"] = ", ".join(row.through[:8]) + (" …" if len(row.through) > 8 else "")
    if row.past:
        details["computed past the dump of"] = ", ".join(row.past[:8]) + (" …" if len(row.past) > 8 else "")
    return Cell(row.key, row.local, mark, STATUS[mark], details)


def _lines(rows: list[Local]) -> list[Series]:
    rows = [row for row in rows if row.key[1] != "moe_router_indices"]
    faulty = frozenset(row.key for row in rows if row.faulty)
    lines = [Series("own error", {row.key: row.local for row in rows}, "test", faulty)]
    inherited = {row.key: row.accumulated for row in rows if row.accumulated is not None}
    lines += [Series("accumulated", inherited, "hf")] if inherited else []
    return [*lines, Series("limit of the own error", {row.key: row.limit for row in rows}, "limit")]


def _faults(told: Explained) -> Listing:
    rows = []
    for fault in told.found.faults:
        where = layers_in_words(fault.layers, fault.count)
        causes = [cause for cause in told.causes if cause.stage == fault.stage]
        words = [cause.explanation.text if cause.explanation else cause.hint for cause in causes]
        size = fault.worst.not_finite if fault.worst.bad else f"{fault.worst.local:.3g}"
        rows.append((fault.stage, where, size, f"{fault.worst.floor:.2g}", "; ".join(words)))
    columns = ("stage", "where", "own error", "floor", "cause or hint")
    return Listing("Faults", "Each stage that is wrong in itself, whatever it inherited.", columns, rows)
