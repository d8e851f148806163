"""A compare's result as a sheet: its cells, lines, tables and words. Nothing is drawn here."""

from __future__ import annotations

import math

import numpy as np

from jaxref.stages import STAGES, Key
from oracle import experts
from oracle.coordinates import in_words
from oracle.experts import Choice
from oracle.metrics import Figures
from oracle.page.pairs import Pairs
from oracle.page.sheet import Cell, Listing, Series, Sheet, Side
from oracle.report import mark_of
from oracle.result import Comparison, Result, Skip
from oracle.sentence import named, sentence
from oracle.trees import Tree, path_of
from oracle.verdict import FEW

EXPERT_ROWS = 200  # of the table of experts at most
FINDINGS = 20
MARKS = {
    "3": "relative L2 below 1e-3, and so on",
    "=": "equal bits",
    "X": "diverges",
    "N": "NaN or infinite in one only",
    "L": "another layout",
    "~": "after a near tie of experts",
    "?": "missing",
}


def sheet_of(result: Result) -> Sheet:
    """All that a page says of a compare but its pictures, from figures that the result holds."""
    cells = [_compared(c) for c in result.comparisons]
    there = {cell.key for cell in cells}
    cells += [_missing(skip) for skip in result.missing if skip.key not in there]
    used = {letter for cell in cells for letter in cell.mark} | {"3"}
    test, reference = (result.trees[role] for role in ("test", "reference"))
    focus = focus_of(result)
    return Sheet(
        title=f"{test.folder.name} against {reference.folder.name}",
        verdict=_verdict(result),
        status={"agree": "agree", "diverge": "diverge", "incomplete": "missing"}[result.verdict],
        sentence=sentence(result),
        cells=cells,
        marks={mark: words for mark, words in MARKS.items() if mark in used},
        facts=_facts(result),
        lines=lines_of(result),
        findings=_findings(result),
        trees=[_side(role, tree, result) for role, tree in result.trees.items()],
        start=focus.key,
    )


def focus_of(result: Result) -> Comparison:
    """The comparison that is looked at closely: the first divergence, or where the test is worst."""
    comparable = [c for c in result.comparisons if c.key[1] != experts.INDICES] or result.comparisons
    return result.first or max(comparable, key=lambda c: c.test.relative_l2)


def _verdict(result: Result) -> str:
    if result.first is not None:
        return f"diverges first at {path_of(result.first.key)}"
    return "agrees" if result.verdict == "agree" else f"incomplete: {len(result.missing)} stages are missing"


def _facts(result: Result) -> dict[str, str]:
    good, first = result.last_good, result.first
    bad = sum(not c.good for c in result.comparisons)
    facts = {"blame": result.blame.words}
    if first is not None:
        facts["last good"] = path_of(good) if good else "none: it is the first stage compared"
        facts["fault"] = str(first.judgement.fault)
    return facts | {"compared": f"{len(result.comparisons)} stages: {bad} diverge, {len(result.missing)} missing"}


def _findings(result: Result) -> list[str]:
    """What a reader should know besides: skipped stages, near ties, and notes on the trees."""
    skipped = [f"not compared: {path_of(skip.key)}: {skip.reason}" for skip in result.skips]
    noted = [f"{path_of(c.key)}: {note}" for c in result.comparisons for note in c.notes]
    return [*result.notes, *_short(skipped, "stages not compared"), *_short(noted, "notes on stages")]


def _short(lines: list[str], what: str) -> list[str]:
    more = len(lines) - FINDINGS
    return lines[:FINDINGS] + ([f"and {more} more {what}"] if more > 0 else [])


def _side(role: str, tree: Tree, result: Result) -> Side:
    guessed = "" if tree.stated_dtype or role != "test" else f", taken as {result.rules.dtype}"
    manifest = tree.manifest
    words = f"{named(tree)}{guessed}, {'no manifest' if manifest is None else f'{len(tree.files)} stages'}"
    if manifest is not None:
        manifest = {name: value for name, value in manifest.items() if name != "files"}
    return Side(role, str(tree.folder), words, manifest)


def _compared(found: Comparison) -> Cell:
    mark, figures = mark_of(found)[0], found.test
    if not figures.count and not figures.mismatched:  # after near ties no expert is in both
        return Cell(found.key, None, mark[:1], found.status, _details(found))
    value = 0.0 if figures.equal else math.inf if figures.mismatched else figures.relative_l2
    return Cell(found.key, value, mark, found.status, _details(found))


def _missing(skip: Skip) -> Cell:
    return Cell(skip.key, None, "?", "missing", {"status": "missing", "why": skip.reason})


def _details(found: Comparison) -> dict[str, str]:
    judgement = found.judgement
    details = {"stage": STAGES[found.key[1]].meaning, "status": found.status}
    details |= {"fault": judgement.fault} if judgement.fault else {}
    details |= {"rule": judgement.rule} | _figures(found.test, "")
    if found.coordinate:
        details["first not finite" if found.test.mismatched else "greatest at"] = in_words(found.coordinate)
    if found.hf is not None:
        details |= {name: value for name, value in _figures(found.hf, "hf ").items() if name in _HF}
    if judgement.ratio is not None:
        details["ratio to hf"] = f"{judgement.ratio:.3g}"
    return details | ({"notes": "; ".join(found.notes)} if found.notes else {})


_HF = ("hf relative L2", "hf cosine", "hf KL, top-1, top-10")


def _figures(figures: Figures, role: str) -> dict[str, str]:
    """The figures by the names that a reader knows from the terminal."""
    found = {
        "relative L2": f"{figures.relative_l2:.3g}",
        "channel median": f"{figures.channel_median:.3g}",
        "cosine": f"{figures.cosine:.8f}",
        "max abs": f"{figures.max_abs:.6g}",
        "rms": f"{figures.rms:.3g}",
        "SNR": f"{figures.snr_db:.1f} dB",
        "ulp median, max": f"{figures.ulp_median:.3g}, {figures.ulp_max:.3g}",
        "values": f"{figures.count:,}",
    }
    if figures.bad_reference or figures.bad_test:
        found["not finite"] = f"{figures.bad_test:,} here, {figures.bad_reference:,} in the reference"
    if figures.kl is not None:
        found["KL, top-1, top-10"] = f"{figures.kl:.3g}, {figures.top1:.0%}, {figures.top10:.0%}"
    return {role + name: value for name, value in found.items()}


def lines_of(result: Result) -> list[Series]:
    """The staircase: every side's error, what is allowed, and below what a ratio says nothing."""
    found = [c for c in result.comparisons if c.key[1] != experts.INDICES and c.test.count]
    bad = frozenset(c.key for c in found if not c.good)
    lines = [Series("test", {c.key: c.test.relative_l2 for c in found}, "test", bad)]
    if "hf" in result.trees:
        lines.append(Series("hf", {c.key: c.hf.relative_l2 for c in found if c.hf}, "hf"))
    limits = {c.key: limit for c in found if (limit := limit_of(result, c)) is not None}
    if limits:
        lines.append(Series("limit", limits, "limit"))
    if "hf" in result.trees:
        lines.append(Series("floor", {c.key: result.rules.floor for c in found}, "floor"))
    return lines


def limit_of(result: Result, comparison: Comparison) -> float | None:
    """The greatest relative L2 that the rules allow a stage; None where they ask for another figure."""
    rules, hf = result.rules, comparison.hf
    written = rules.written(comparison.key)
    if written is not None:
        numbers = [number for name, sign, number in written.terms if name == "relative_l2" and sign.startswith("<")]
        return min(numbers, default=None)
    if hf is None:
        return rules.bound(comparison.key)
    # Of few values the stage before counts as well, which is no line any more.
    return rules.max_ratio * max(hf.relative_l2, rules.floor) if comparison.test.count >= FEW else None


def experts_of(pairs: Pairs) -> list[Listing]:
    """Where the sides chose other experts, one row a token; nothing for a model without experts."""
    rows: list[list[str]] = []
    for layer in sorted({layer for _, layer in pairs.chosen}):
        rows += _expert_rows(pairs, layer)
    if not pairs.chosen:
        return []
    more = len(rows) - EXPERT_ROWS
    caption = f"The first {EXPERT_ROWS} of {len(rows)} tokens." if more > 0 else ""
    caption = caption or ("" if rows else "Every side chose the same experts at every token that all of them hold.")
    columns = ["layer", "token", "reference", *(column for role in pairs.others for column in (role, f"{role} is"))]
    return [Listing("Experts that differ", caption, columns, rows[:EXPERT_ROWS])]


def _expert_rows(pairs: Pairs, layer: int) -> list[list[str]]:
    choices = {role: pairs.chosen[role, layer] for role in pairs.others if (role, layer) in pairs.chosen}
    tokens = sorted(set().union(*(_differing(choice) for choice in choices.values())))
    tied = pairs.after_tie(layer)
    rows = []
    for token in tokens:
        row = [str(layer), str(token), _ids(pairs, layer, "reference", token)]
        for role in pairs.others:
            choice = choices.get(role)
            row += [_ids(pairs, layer, role, token), _reading(choice, token, tied) if choice else ""]
        rows.append(row)
    return rows


def _differing(choice: Choice) -> set[int]:
    """Tokens at which some expert of the reference was not chosen."""
    return {choice.positions[row] for row in np.flatnonzero(~np.all(choice.matched, axis=1))}


def _ids(pairs: Pairs, layer: int, role: str, token: int) -> str:
    key: Key = (layer, experts.INDICES)
    if role != "reference" and (role, layer) not in pairs.chosen:
        return ""
    view = pairs.view(key, role)
    if token not in view.positions:
        return ""
    return ", ".join(f"{expert:g}" for expert in view.values[0, view.positions.index(token)])


def _reading(choice: Choice, token: int, tied: set[int]) -> str:
    if any(swap["token"] == token for swap in choice.faults):
        return "after a near tie" if token in tied else "wrong"
    return "at a near tie" if any(swap["token"] == token for swap in choice.ties) else "the same"
