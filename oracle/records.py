"""What a machine reads of a compare: JSON records, one a line, and a JUnit report for CI."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jaxref.stages import Key
from oracle.metrics import jsonable
from oracle.output import check_output, legible, whole
from oracle.report import as_text, figures_in_words
from oracle.result import Comparison, Result, Skip

SCHEMA = "jaxref-compare-v1"
_JUNIT = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<testsuites?\b")
_DECLARATION = "<?xml version='1.0' encoding='utf-8'?>\n"


def records(result: Result) -> Iterator[dict[str, Any]]:
    """JSON records: `config`, then a `comparison` or `skip` a stage, and `summary` last."""
    yield {"record": "config", "schema": SCHEMA, **_config(result)}
    yield from (_comparison(c) for c in result.comparisons)
    yield from (_skip(skip) for skip in result.skips)
    yield _summary_record(result)


def _config(result: Result) -> dict[str, Any]:
    def facts(role: str) -> dict[str, Any] | None:
        tree = result.trees.get(role)
        if tree is None:
            return None
        manifest = tree.manifest or {}
        stated = {name: manifest.get(name) for name in ("producer", "model", "device", "versions")}
        return {"path": str(tree.folder), "dtype": tree.stated_dtype, "manifest": tree.manifest is not None, **stated}

    rules = result.rules
    return {role: facts(role) for role in ("reference", "test", "hf")} | {
        "dtype": rules.dtype,
        "tolerances": [rule.text for rule in rules.tolerances],
        "min_cosine": rules.min_cosine,
        "max_ratio": rules.max_ratio if "hf" in result.trees else None,
        "floor": rules.floor,
        "notes": result.notes,
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    layer, stage = found.key
    judgement = found.judgement
    return {
        "record": "comparison",
        "layer": layer,
        "stage": stage,
        "status": found.status,
        "rule": judgement.rule,
        "fault": judgement.fault,
        "ratio": jsonable(judgement.ratio),
        **found.test.to_json(),
        "coordinate": found.coordinate,
        "hf": found.hf.to_json() if found.hf else None,
        "notes": list(found.notes),
    }


def _skip(skip: Skip) -> dict[str, Any]:
    layer, stage = skip.key
    return {"record": "skip", "layer": layer, "stage": stage, "reason": skip.reason, "missing": skip.missing}


def _summary_record(result: Result) -> dict[str, Any]:
    worst = max(result.comparisons, key=lambda c: c.test.relative_l2)
    return {
        "record": "summary",
        "verdict": result.verdict,
        "compared": len(result.comparisons),
        "diverged": sum(not c.good for c in result.comparisons),
        "missing": len(result.missing),
        "skipped": len(result.skips),
        "first_divergence": _first_record(result),
        "blame": result.blame.who,
        "blame_reason": result.blame.words,
        "worst": {"layer": worst.key[0], "stage": worst.key[1], "relative_l2": jsonable(worst.test.relative_l2)},
    }


def _first_record(result: Result) -> dict[str, Any] | None:
    first = result.first
    if first is None:
        return None
    good = result.last_good
    return {
        "layer": first.key[0],
        "stage": first.key[1],
        "last_good": good[1] if good else None,
        "last_good_layer": good[0] if good else None,
        "coordinate": first.coordinate,
        "worst": {name: jsonable(value) for name, value in result.worst.items()},
        "status": first.status,
        "fault": first.judgement.fault,
        "rule": first.judgement.rule,
        "relative_l2": jsonable(first.test.relative_l2),
        "cosine": first.test.cosine,
    }


def print_json(result: Result) -> None:
    """JSON Lines on stdout."""
    for record in records(result):
        print(json.dumps(record, allow_nan=False))


def check_junit(path: Path) -> None:
    """Raise `UserError` where no JUnit report could be written, or only in another file's place."""
    check_output(path, "JUnit report", "report.xml", _JUNIT)


def write_junit(result: Result, path: Path) -> None:
    """One test case a stage of a layer; missing ones are errors. Raises `UserError` where it cannot be written."""
    check_junit(path)
    with whole(path) as temporary:
        text = ElementTree.tostring(_suite(result), encoding="unicode")
        temporary.write_text(_DECLARATION + legible(text), encoding="utf-8")


def _suite(result: Result) -> ElementTree.Element:
    bad = sum(not c.good for c in result.comparisons)
    total = len(result.comparisons) + len(result.skips)
    counts = {"tests": total, "failures": bad, "errors": len(result.missing)}
    counts["skipped"] = len(result.skips) - len(result.missing)
    attributes = {"name": "oracle compare"} | {name: str(count) for name, count in counts.items()}
    suite = ElementTree.Element("testsuite", attributes)
    for found in result.comparisons:
        case = _case(suite, found.key)
        if not found.good:
            words = f"{found.judgement.fault} ({found.judgement.rule}); {', '.join(figures_in_words(found.test))}"
            ElementTree.SubElement(case, "failure", message=str(found.judgement.fault)).text = words
    for skip in result.skips:
        ElementTree.SubElement(_case(suite, skip.key), "error" if skip.missing else "skipped", message=skip.reason)
    ElementTree.SubElement(suite, "system-out").text = as_text(result)
    return suite


def _case(suite: ElementTree.Element, key: Key) -> ElementTree.Element:
    group = "model" if key[0] is None else f"layer-{key[0]}"
    return ElementTree.SubElement(suite, "testcase", classname=group, name=key[1])
