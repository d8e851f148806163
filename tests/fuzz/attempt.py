"""One input through one reader, with its time and memory limited: taken, refused, or a finding."""

from __future__ import annotations

import contextlib
import re
import signal
import traceback
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jaxtyping

from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.world import World
from weights import UserError

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 15
# Python's own objects take more than the bytes they come from: a dictionary of one key some forty times as much.
FACTOR, CONSTANT = 64, 12 << 20
LARGEST = 100_000  # bytes of an input
LONGEST = 20_000  # characters of a message: a few dozen names and values, each cut short
OURS = ("/weights/", "/jaxref/", "/oracle/")


@dataclass(frozen=True)
class Outcome:
    """`kind` is "taken", "refused" or "finding"; `where` the line that said so, `words` what it said."""

    kind: str
    where: str
    words: str = ""

    @property
    def signature(self) -> str:
        """The same for outcomes that differ in names and numbers alone."""
        words = re.sub(r"""'[^']*'|"[^"]*"|\[[^]]*\]|/\S*|[\d.]+|nan|inf""", "", self.words.partition(": ")[2])
        return f"{self.kind} {self.where} {words[:50]}"


class TooLong(BaseException):
    """Past the time that one input may take; not an `Exception`, so that no reader takes it for its own."""


def attempt(target: Target, world: World, data: bytes, *, measured: bool = True) -> Outcome:
    """Run a reader on an input. A refusal must be one line; memory is bounded by the input's size."""
    memory = _memory_limit(len(data)) if measured else contextlib.nullcontext()
    try:
        with time_limit(), memory, _as_people_run_it():
            target.check(world, data)
    except UserError as error:
        words, where = str(error), _place(error)
        if not words.strip() or "\n" in words or len(words) > LONGEST:
            return Outcome(
                "finding", where, f"not one line a person can read: {len(words)} characters, {words[:200]!r}"
            )
        return Outcome("refused", where, words)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust is no Exception
        return Outcome("finding", _place(error), f"{type(error).__name__}: {str(error)[:300]}")
    return Outcome("taken", "")


def _place(error: BaseException) -> str:
    """The innermost line of ours that a traceback goes through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(part in frame.filename for part in OURS)] or frames
    frame = ours[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


@contextlib.contextmanager
def _as_people_run_it() -> Iterator[None]:
    """Without the checks of shapes that all other tests run under, which fail in ways of their own, and slowly."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `TooLong` after `SECONDS`."""

    def late(number: int, frame: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > CONSTANT + FACTOR * size:
            raise AssertionError(f"{peak:,} bytes of memory for {size:,} bytes of input")


def warm(target: Target, world: World) -> list[bytes]:
    """The target's valid inputs, run once so that imports and shared files are not counted; each must be taken."""
    seeds = target.seeds(world)
    for seed in seeds:
        outcome = attempt(target, world, seed, measured=False)
        assert outcome.kind == "taken", (target.name, outcome)
    return seeds


def kept(target: Target) -> list[Path]:
    """The target's files in the corpus."""
    return sorted((CORPUS / target.name).glob("*"))


def changed(target: Target, seeds: list[bytes], reached: list[bytes], random: Random) -> bytes:
    """A new input, out of a valid one or of one that reached something."""
    data = random.choice(reached if reached and random.randrange(2) else seeds)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if len(data) < LARGEST:  # copies of copies grow without end
            data = target.mutate(data, random)
    return data


__all__ = ["CORPUS", "SECONDS", "TARGETS", "Outcome", "attempt", "changed", "kept", "time_limit", "warm"]
