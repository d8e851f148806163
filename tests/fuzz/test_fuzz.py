"""The corpus, and new inputs that are the same in every run: no reader ends in anything but a refusal in one line."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.attempt import CORPUS, TARGETS, attempt, changed, kept, warm
from tests.fuzz.world import World

# Fewer of the slow ones, so that all of them take half a minute.
EXAMPLES = {"manifest": 25, "tree": 25, "unfinished": 30, "template": 40, "command": 40}


@pytest.fixture(scope="session", params=TARGETS)
def readied(request: pytest.FixtureRequest, world: World) -> tuple[str, list[bytes]]:
    return request.param, warm(TARGETS[request.param], world)


def test_the_corpus_is_small_and_of_known_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert len({path.parent.name for path in files}) > len(TARGETS) / 2


def test_the_corpus(readied: tuple[str, list[bytes]], world: World) -> None:
    target = TARGETS[readied[0]]
    outcomes = {path.name: attempt(target, world, path.read_bytes()) for path in kept(target)}
    assert not {name: outcome for name, outcome in outcomes.items() if outcome.kind == "finding"}


def test_new_inputs(readied: tuple[str, list[bytes]], world: World) -> None:
    name, seeds = readied
    target, reached = TARGETS[name], [path.read_bytes() for path in kept(TARGETS[name])]

    @given(random=st.randoms(use_true_random=False))
    @settings(
        max_examples=EXAMPLES.get(name, 80),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def holds(random: Random) -> None:
        data = changed(target, seeds, reached, random)
        outcome = attempt(target, world, data)
        assert outcome.kind != "finding", (outcome, data[:2000])

    holds()


def test_a_fault_would_be_found(world: World, tmp_path: Path) -> None:
    """The judge itself: an exception, too much memory, two lines and no end are findings."""
    from dataclasses import replace

    from weights import UserError

    def two_lines(world: World, data: bytes) -> None:
        raise UserError("two\nlines")

    checks = {
        "KeyError": lambda world, data: {}[data],
        "bytes of memory": lambda world, data: bytearray(64 << 20),
        "one line": two_lines,
    }
    for words, check in checks.items():
        outcome = attempt(replace(TARGETS["aprt"], check=check), world, b"")
        assert outcome.kind == "finding" and words in outcome.words
