"""Small things that several tests need: run a dump, read what it wrote, measure a distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxref.aprt import read_aprt
from jaxref.dump import Job, Report, dump
from jaxref.precision import numerics_of
from jaxref.selection import select
from weights import open_checkpoint


def write_tree(
    folder: Path,
    output: Path,
    tokens: list[int],
    *,
    stages: str = "all",
    layers: str = "all",
    positions: str | None = None,
    dtype: str = "float32",
    form: str = "aprt",
    convention: str = "canonical",
    as_stored: bool = False,
    max_memory: int | None = None,
    **options,
) -> Report:
    """Dump with options as people type them."""
    checkpoint = open_checkpoint(folder)
    selection = select(checkpoint.config, len(tokens), stages, layers, positions)
    job = Job(
        checkpoint,
        list(tokens),
        selection,
        numerics_of(dtype),
        output,
        form,
        convention=convention,
        as_stored=as_stored,
        max_memory=max_memory,
    )
    return dump(job, **options)


def read_tree(folder: Path) -> dict[str, np.ndarray]:
    """Path below the folder -> flat values of every APRT file."""
    return {str(p.relative_to(folder)): read_aprt(p)[1] for p in sorted(folder.rglob("*.bin"))}


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.bin"))}


def flat(trace: dict) -> dict[str, np.ndarray]:
    """A nested trace as {"layer-0/attn_norm": array, …}."""
    found = {}
    for key, value in trace.items():
        found |= (
            {f"{key}/{k}": np.asarray(v) for k, v in value.items()}
            if isinstance(value, dict)
            else {key: np.asarray(value)}
        )
    return found


def distance(test: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 in float64."""
    a, b = np.asarray(test, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def distances(test: dict, reference: dict) -> dict[str, float]:
    """Relative L2 of every stage; both must have the same ones, in the same shapes."""
    ours, theirs = flat(test), flat(reference)
    assert set(ours) == set(theirs)
    assert all(ours[k].shape == theirs[k].shape for k in ours)
    return {key: distance(ours[key], theirs[key]) for key in ours}
