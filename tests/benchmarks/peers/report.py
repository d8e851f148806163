"""The result as Markdown: medians and ratios, what each peer captured, the bound, who did not run and why."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.peers.table import OURS


def report(found: dict[str, Any]) -> str:
    """All tables of one benchmark."""
    where = found["machine"]
    versions = {name: v for peer in found["peers"].values() for name, v in (peer["versions"] or {}).items()}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{found['model']}; {where['cpu']}, {where['cores']} cores, {where['memory_gb']} GB; "
        f"Python {where['python']}, {told}. Whole processes, medians.",
        "",
        *_speed(found["rows"]),
        *_captures(found),
        *_bounds(found),
    ]
    if found["failed"]:
        lines += ["Not measured:", "", *[f"- {name}: {reason}" for name, reason in found["failed"].items()], ""]
    return "\n".join(lines)


def _speed(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| tokens | program | runs | seconds | CPU seconds | peak MB | tensors | MB written | times jaxref's seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        m, ours = row["median"], _ours(rows, row["tokens"])
        times = "" if ours is None or row["peer"] == OURS else f"{m['seconds'] / ours['median']['seconds']:.2f}"
        lines.append(
            f"| {row['tokens']} | {row['peer']} | {len(row['runs'])} | {m['seconds']:.2f} | {m['cpu_seconds']:.2f}"
            f" | {m['peak_mb']:.0f} | {m['tensors']} | {m['size'] / 1e6:.1f} | {times} |"
        )
    cold = [f"{row['cold']['seconds']:.2f} s at {row['tokens']} tokens" for row in rows if row.get("cold")]
    return [*lines, "", *([f"jaxref with nothing compiled before: {', '.join(cold)}.", ""] if cold else [])]


def _ours(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any] | None:
    return next((row for row in rows if (row["peer"], row["tokens"]) == (OURS, tokens)), None)


def _captures(found: dict[str, Any]) -> list[str]:
    lines = [
        "| program | stages captured | not captured | greatest relative L2 from jaxref | what runs |",
        "|---|---|---|---|---|",
    ]
    for name, seen in found["captured"].items():
        all_of = len(seen["captured"]) + len(seen["missing"]) + len(seen["differs"])
        absent = ", ".join([*seen["missing"], *[f"{stage} (differs)" for stage in seen["differs"]]]) or "none"
        worst = "" if name == OURS or seen["worst"] is None else f"{seen['worst']:.1e}"
        what = found["peers"][name]["what"]
        lines.append(f"| {name} | {len(seen['captured'])} of {all_of} | {absent} | {worst} | {what} |")
    return [*lines, "", "Captured is a stage that has jaxref's values in every layer, at the first of the lengths.", ""]


def _bounds(found: dict[str, Any]) -> list[str]:
    if not found["bounds"]:
        return []
    lines = [
        "| tokens | read + upcast | multiply | write | digest | bound: greatest | bound: sum | start and imports"
        " | jaxref | of greatest | of sum |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bound in found["bounds"]:
        row = _ours(found["rows"], bound["tokens"])
        seconds = row["median"]["seconds"] if row else float("nan")
        cells = [bound["seconds"][part] for part in ("read", "multiply", "write", "digest")]
        cells += [bound["max"], bound["sum"], bound["start"], seconds]
        ratios = [seconds / bound["max"], seconds / bound["sum"]]
        words = [*(f"{cell:.2f} s" for cell in cells), *(f"{ratio:.1f} ×" for ratio in ratios)]
        lines.append(f"| {bound['tokens']} | {' | '.join(words)} |")
    note = (
        "Each part by itself at this machine's rates, all cores on it: greatest if all ran beside each other for"
        " nothing, sum if one came after the other. Start, imports and what is no matrix product are not in the bound."
    )
    return [*lines, "", note, "", *map(_rates, found["bounds"]), ""]


def _rates(bound: dict[str, Any]) -> str:
    return (
        f"- {bound['tokens']} tokens: {bound['bytes_read'] / 1e6:.0f} MB of weights at"
        f" {bound['read_bytes_per_second'] / 1e9:.1f} GB/s (read and made float32),"
        f" {bound['flops'] / 1e9:.1f} GFLOP of matrix products at {bound['flops_per_second'] / 1e9:.0f} GFLOP/s,"
        f" {bound['bytes_written'] / 1e6:.0f} MB of files at {bound['write_bytes_per_second'] / 1e9:.1f} GB/s,"
        f" SHA-256 at {bound['digest_bytes_per_second'] / 1e9:.1f} GB/s"
    )
