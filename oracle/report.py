"""What a person, a machine and a CI read of a compare: a table and the first divergence, JSON records, JUnit."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxref.stages import STAGES
from oracle.coordinates import in_words
from oracle.metrics import Figures
from oracle.output import legible
from oracle.result import Comparison, Result
from oracle.trees import path_of

WIDTH = 80  # of what is piped or put into a message
# Two letters a stage, so that all of them fit side by side into 80 columns.
SHORT = {
    "embedding": "em", "attn_norm": "an", "qkv_matmul": "qm", "qkv_bias": "qb", "q_norm": "qn", "k_norm": "kn",
    "q_post_rope": "qr", "k_post_rope": "kr", "attn_scores": "sc", "attn_softmax": "sm", "attention": "at",
    "attn_out": "ao", "post_attn_residual": "r1", "ffn_norm": "fn", "ffn_gate": "ga", "ffn_up": "up",
    "ffn_silu": "si", "ffn_swigl": "sw", "ffn_out": "fo", "moe_router_logits": "rl", "moe_router": "ro",
    "moe_router_indices": "ri", "moe_expert_gate": "eg", "moe_expert_up": "eu", "moe_expert_swigl": "es",
    "moe_expert_out": "eo", "moe_ffn_out": "mo", "post_ffn_residual": "r2", "final_norm": "no", "lm_head": "lm",
}  # fmt: skip
_STYLES = {"agree": "green", "tie": "yellow", "diverge": "bold red", "layout": "bold magenta", "missing": "bold yellow"}
_MARKS = {"diverge": "X", "layout": "L", "tie": "~", "missing": "?"}


def print_report(result: Result, console: Console | None = None) -> None:
    """The table, the first divergence, and the verdict, at 80 columns or as wide as the terminal is."""
    out = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for line in _lines(result):
        out.print(line, soft_wrap=isinstance(line, str), markup=False, emoji=False)


def as_text(result: Result) -> str:
    """The report without colours, for a message."""
    out = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None)
    print_report(result, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def _lines(result: Result) -> Iterator[str | Text]:
    for role, tree in result.trees.items():
        dtype = tree.stated_dtype or (result.rules.dtype if role == "test" else "no manifest")
        yield _unbroken(f"{role:9} {dtype:9} {tree.folder}")
    yield Text()
    yield from _table(result)
    yield Text()
    yield from (_hanging(line, 13) for line in _first_divergence(result))
    yield from (_hanging(line, 2) for line in _summary(result))


def _unbroken(line: str) -> str:
    """A line that stays one, whatever the folder in it is called: a path is copied out of it."""
    return legible(line).replace("\n", r"\n")


def _hanging(line: str, indent: int) -> Text:
    """A line that people may have to break, broken where the next lines begin under its words."""
    options = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    return Text("\n".join(textwrap.wrap(legible(line), WIDTH, **options)), overflow="ignore", no_wrap=True)


def _table(result: Result) -> Iterator[Text]:
    """One row a layer, one column a stage."""
    cells = {c.key: mark_of(c) for c in result.comparisons}
    cells |= {skip.key: ("?", "missing") for skip in result.missing if skip.key not in cells}
    stages = [name for name in STAGES if any(key[1] == name for key in cells)]
    yield Text("layer " + " ".join(SHORT.get(name, name[:2]) for name in stages), style="bold")
    for layer in dict.fromkeys(key[0] for key in sorted(cells, key=lambda key: (key[0] is None, key[0] or 0))):
        line = Text(f"{'model' if layer is None else layer:>5} ")
        for name in stages:
            mark, status = cells.get((layer, name), ("", ""))
            line.append(f"{mark:>2} ", style=_STYLES.get(status))
        line.rstrip()
        yield line
    yield Text()
    legend = ", ".join(f"{SHORT.get(name, name[:2])} {name}" for name in stages)
    yield Text(f"3: relative L2 below 1e-3 and so on, =: equal bits, {_marks_of(cells)}. {legend}.", style="dim")


def _marks_of(cells: dict[Any, tuple[str, str]]) -> str:
    words = {
        "diverge": "X: diverges",
        "layout": "L: another layout",
        "tie": "~: after a near tie",
        "missing": "?: missing",
    }
    there = {status for _, status in cells.values()}
    marks = [words[status] for status in words if status in there or status == "diverge"]
    marks += ["N: NaN or infinite in one only"] if any(mark.endswith("N") for mark, _ in cells.values()) else []
    return ", ".join(marks)


def mark_of(comparison: Comparison) -> tuple[str, str]:
    """A mark and its style: how many decimals agree, or what is wrong."""
    figures = comparison.test
    digits = "=" if figures.equal else str(max(0, min(9, _decimals(figures.relative_l2))))
    if figures.mismatched and not comparison.good:
        digits = "N"
    return _MARKS.get(comparison.status, "") + digits, comparison.status


def _decimals(error: float) -> int:
    return next((n for n in range(9, 0, -1) if error < 10.0**-n), 0)


def _first_divergence(result: Result) -> Iterator[str]:
    first = result.first
    if first is None:
        return
    figures, judgement = first.test, first.judgement
    good = path_of(result.last_good) if result.last_good else "none: it is the first stage compared"
    yield f"First divergence: {path_of(first.key)} ({STAGES[first.key[1]].meaning})"
    yield f"  fault      {judgement.fault}"
    yield f"  rule       {judgement.rule}"
    yield f"  last good  {good}"
    if figures.mismatched:
        yield f"  not finite {in_words(first.coordinate)} is the first"
    else:
        yield f"  greatest   {in_words(first.coordinate)}: max abs {figures.max_abs:.6g}"
    yield f"  worst      {_worst(result.worst)}"
    for role, found in (("test", figures), ("hf", first.hf)):
        for line in figures_in_words(found) if found else []:
            yield f"  {role:10} {line}"
            role = ""
    if figures.kl is not None:
        yield f"  logits     {_logits(figures)}"
    yield from (f"  note       {note}" for note in first.notes)


def _worst(worst: dict[str, Any]) -> str:
    words = f"token {worst['token']} (relative L2 {worst['token_relative_l2']:.3g})"
    if "head" in worst:
        words += f", head {worst['head']} ({worst['head_relative_l2']:.3g})"
    return words


def figures_in_words(figures: Figures) -> list[str]:
    """Two lines that fit beside their name."""
    return [
        f"relative L2 {figures.relative_l2:.3g}, channel median {figures.channel_median:.3g}, "
        f"cosine {figures.cosine:.8f}",
        f"rms {figures.rms:.3g}, SNR {figures.snr_db:.1f} dB, ulp median {figures.ulp_median:.3g}, "
        f"max {figures.ulp_max:.3g}",
    ]


def _logits(figures: Figures) -> str:
    return f"KL {figures.kl:.3g}, top-1 {figures.top1:.0%}, top-10 {figures.top10:.0%}"


def _summary(result: Result) -> Iterator[str]:
    if result.verdict != "diverge":
        yield _worst_stage(result)
    head = next((c for c in result.comparisons if c.key == (None, "lm_head")), None)
    if head is not None and head.test.kl is not None:
        yield f"logits: {_logits(head.test)}"
    for skip in result.missing[:8]:
        yield f"missing: {path_of(skip.key)}: {skip.reason}"
    if len(result.missing) > 8:
        yield f"missing: and {len(result.missing) - 8} more"
    allowed = len(result.skips) - len(result.missing)
    if allowed:
        yield f"not compared: {allowed}, first {path_of(next(s for s in result.skips if not s.missing).key)}"
    ties = [f"{path_of(c.key)}: {note}" for c in result.comparisons for note in c.notes if note.startswith("near tie")]
    yield from ties[:4]
    yield from (f"note: {note}" for note in result.notes)
    yield f"blame: {result.blame.words}"
    yield f"{result.verdict}: {len(result.comparisons)} stages compared, {_count(result)}"


def _worst_stage(result: Result) -> str:
    worst = max(result.comparisons, key=lambda c: c.test.relative_l2)
    if all(c.test.equal for c in result.comparisons):
        return "every value compared equals the reference's"
    hf = f" (hf {_share(worst.hf.relative_l2)})" if worst.hf else ""
    return f"{result.rules.coarser} is worst at {_place(worst)}: relative L2 {_share(worst.test.relative_l2)}{hf}"


def _share(error: float) -> str:
    """As a percentage, or as it stands where that would be 0.00%."""
    percentage = f"{error:.2%}"
    return percentage if percentage != "0.00%" else f"{error:.2g}"


def _place(comparison: Comparison) -> str:
    layer, stage = comparison.key
    return stage if layer is None else f"layer {layer} {stage}"


def _count(result: Result) -> str:
    bad = sum(not c.good for c in result.comparisons)
    return f"{bad} diverge, {len(result.missing)} missing"


def print_diff(found: dict[str, Any]) -> None:
    """The figures of two files, and their greatest differences."""
    out = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)

    def number(value: float | None, form: str = ".8g") -> str:
        return "NaN" if value is None else format(value, form)

    for name in ("path_a", "path_b", "layer", "dim_product"):
        out.print(Text(_unbroken(f"{name:12} {found[name]}")), soft_wrap=True)
    out.print(f"max abs diff {number(found['max_abs_diff'])} at {found['max_abs_diff_index']}")
    out.print(f"rms diff     {number(found['rms_diff'])}")
    out.print(f"cosine       {number(found['cosine_sim'], '.10f')}")
    table = Table("index", "a", "b", "abs diff", box=None, pad_edge=False)
    for row in found["top_diffs"]:
        table.add_row(str(row["index"]), *(number(row[name]) for name in ("a", "b", "abs_diff")))
    out.print(table)


def print_wrapped(out: Console, line: str, indent: int) -> None:
    """A line between words, as wide as the console is, what is left of it `indent` blanks in."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    words = textwrap.wrap(legible(line), out.width, subsequent_indent=" " * indent, **options)
    out.print(Text("\n".join(words), overflow="ignore", no_wrap=True))
