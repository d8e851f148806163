"""`python -m tests.fuzz --minutes 10`: new inputs for all targets, each in a process of its own, with fresh seeds."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import click

from tests.fuzz.attempt import CORPUS, TARGETS, attempt, changed, kept, warm
from tests.fuzz.world import World

MEMORY = 3 << 30  # bytes of address space beyond what the libraries take: what Rust and C allocate counts here
LARGEST = 24_000  # bytes of an input that is worth keeping for its refusal alone
MOST_KEPT = 20
MEASURED = 4  # memory is traced in one of so many runs, which makes it several times slower


@click.command()
@click.option("--minutes", type=float, default=10, show_default=True, help="For all targets together.")
@click.option("--target", "only", multiple=True, type=click.Choice(list(TARGETS)), help="Only this one.")
@click.option("--seed", type=int, help="Of the first target; printed, so that a run can be had again.")
@click.option("--keep", is_flag=True, help="Keep small inputs that reach new refusals in the corpus.")
@click.option("--inside", type=float, hidden=True, help="Seconds: run one target here.")
def main(minutes: float, only: tuple[str, ...], seed: int | None, keep: bool, inside: float | None) -> None:
    """Try new inputs and print one line a target. Exit 1 where something was found."""
    names = only or tuple(TARGETS)
    seed = time.time_ns() % 1_000_000_000 if seed is None else seed
    if inside is not None:
        _run_inside(names[0], inside, seed, keep)
        return
    found = sum(_run_apart(name, 60 * minutes / len(names), seed + i, keep) for i, name in enumerate(names))
    sys.exit(1 if found else 0)


def _run_apart(name: str, seconds: float, seed: int, keep: bool) -> int:
    """One target in a process of its own, which may die of an input. Returns the number of findings."""
    with tempfile.TemporaryDirectory(prefix="jaxref-fuzz-") as folder:
        words = [sys.executable, "-m", "tests.fuzz", "--target", name, "--seed", str(seed), "--inside", str(seconds)]
        done = subprocess.run(
            [*words, *["--keep"] * keep], cwd=CORPUS.parents[2], env=_environment(folder), check=False
        )
        report, pending = Path(folder) / "report.json", Path(folder) / "pending"
        if done.returncode == 0 and report.exists():
            facts = json.loads(report.read_text())
            print(f"{name:12} {facts['line']}, seed {seed}", flush=True)
            return int(facts["findings"])
        _keep(name, pending.read_bytes() if pending.exists() else b"", "died")
        print(f"{name:12} its process ended with {done.returncode}: the last input is kept, seed {seed}", flush=True)
        return 1


def _environment(folder: str) -> dict[str, str]:
    return {**os.environ, "TMPDIR": folder, "JAX_PLATFORMS": "cpu"}


def _run_inside(name: str, seconds: float, seed: int, keep: bool) -> None:
    target, random, folder = TARGETS[name], Random(seed), Path(tempfile.gettempdir())
    world = World(folder / "world")
    seeds, reached = warm(target, world), [path.read_bytes() for path in kept(target)]
    _limit_memory()
    counts: Counter[str] = Counter()
    known = {attempt(target, world, data).signature for data in seeds + reached}
    told = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = changed(target, seeds, reached, random)
        (folder / "pending").write_bytes(data)
        outcome = attempt(target, world, data, measured=random.randrange(MEASURED) == 0)
        counts[outcome.kind] += 1
        new = outcome.signature not in known
        known.add(outcome.signature)
        if outcome.kind == "finding" and new:
            told += 1
            print(f"{name:12} FINDING {outcome.where}: {outcome.words}", flush=True)
            _keep(name, data, "found")
        elif new and len(data) <= LARGEST:  # it reached something: more of its kind may reach further
            reached.append(data)
            if keep and len(reached) <= MOST_KEPT:
                _keep(name, data, outcome.kind)
    line = ", ".join(f"{counts[kind]} {kind}" for kind in ("taken", "refused", "finding"))
    refusals = sum(signature.startswith("refused") for signature in known)
    facts = {"line": f"{counts.total()} inputs: {line}; {refusals} distinct refusals", "findings": told}
    (folder / "report.json").write_text(json.dumps(facts))


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _keep(name: str, data: bytes, kind: str) -> None:
    path = CORPUS / name / f"{kind}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
