"""What a machine reads of `localize` and `explain`: JSON records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from oracle.explain import Explained
from oracle.floor import MARGIN
from oracle.local import Fault, Local
from oracle.metrics import jsonable
from oracle.told import sentence

SCHEMA = "jaxref-localize-v1"


def records(told: Explained, *, explained: bool) -> Iterator[dict[str, Any]]:
    """JSON records: `config`, a `stage` each, `unknown` ones, and `summary` last."""
    found = told.found
    engine = {"path": str(found.engine.tree.folder), "numerics": found.numerics, "tokens": found.engine.tokens}
    yield {"record": "config", "schema": SCHEMA, "margin": MARGIN, **engine, "notes": found.notes}
    for row in found.locals:
        yield {"record": "stage", "layer": row.key[0], "stage": row.key[1], "faulty": row.faulty, **_figures(row)}
    for key, reason in found.unknown.items():
        yield {"record": "unknown", "layer": key[0], "stage": key[1], "reason": reason}
    faults = [entry for fault in found.faults for entry in _faults(fault, told, explained)]
    yield {"record": "summary", "verdict": found.verdict, "faults": faults, "sentence": sentence(told)}


def _faults(fault: Fault, told: Explained, explained: bool) -> Iterator[dict[str, Any]]:
    entry = {"stage": fault.stage, "layers": list(fault.layers), "spared": list(fault.spared)}
    entry |= {"tainted": list(fault.tainted), **_figures(fault.worst)}
    if not explained:
        yield entry
        return
    for cause in (cause for cause in told.causes if cause.stage == fault.stage):
        e = cause.explanation
        named = None
        if e is not None:
            named = {"hypothesis": e.hypothesis, "parameter": e.parameter, "text": e.text}
            named |= {"residual": jsonable(e.residual), "same": list(e.same), "stages": list(e.stages)}
        yield entry | {"layers": list(cause.layers), "explanation": named, "hint": cause.hint}


def _figures(row: Local) -> dict[str, Any]:
    numbers = {"local_rel_l2": row.local, "floor": row.floor, "limit": row.limit, "accumulated": row.accumulated}
    numbers |= {"inherited": row.inherited, "amplification": row.amplification, "drift": row.drift}
    found: dict[str, Any] = {name: jsonable(value) for name, value in numbers.items()}
    where = {name: jsonable(value) for name, value in row.where.items()}
    found |= {"not_finite": row.bad, "inherited_not_finite": row.tainted, "wrong": row.wrong, "where": where}
    return found | {"through": list(row.through), "past": list(row.past)}
