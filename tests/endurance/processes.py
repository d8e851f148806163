"""Commands as processes of their own, forked from one that has done the imports: 0.2 s each, and they can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import click
import pytest

from jaxref.__main__ import main
from tests.endurance.events import Disk, kill
from weights.cli import run

PRELOAD = ["jaxref.__main__", "jaxref.show", "jaxref.dump", "tests.endurance.processes"]
# What a child does before it runs the command; a function of a module, so that its name can be sent.
Prepare = Callable[[Path], None]


def small_blocks(folder: Path) -> None:
    """Attention of two query rows of 6 heads and 5 keys at once."""
    from jaxref import model

    model.SCORES_IN_BLOCK = 60


def _run(words: list[str], folder: Path, at: int | None, said: Path, prepare: Prepare | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if prepare is not None:
        prepare(folder)
    sys.argv = ["jaxref", *words, "--output", str(folder)]
    with Disk(folder, at, kill).watched():
        run(main)


class Command:
    """One `python -m jaxref`, begun at once; with `at` it is killed at its N-th change of the folder."""

    count = 0

    def __init__(
        self, words: Sequence[object], folder: Path, at: int | None = None, prepare: Prepare | None = None
    ) -> None:
        Command.count += 1
        self._said = folder.parent / f"said-{Command.count}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = ([str(word) for word in words], folder, at, self._said, prepare)
        self.process: BaseProcess = context.Process(target=_run, args=arguments)
        self.process.start()

    def end(self) -> tuple[int, str]:
        """The exit code (negative: the signal) and what it said on stderr."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self._said.with_suffix(".err").read_text("utf-8")


def here(
    words: Sequence[object], folder: Path, capsys: pytest.CaptureFixture[str], command: click.Command = main
) -> tuple[int, str]:
    """The same in this process, in a tenth of the time."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with (
        patch.object(sys, "argv", ["jaxref", *map(str, words), "--output", str(folder)]),
        patch.object(sys, "unraisablehook", sys.unraisablehook),
        pytest.raises(SystemExit) as end,
    ):
        run(command)
    for number, handler in handlers:
        signal.signal(number, handler)
    return int(end.value.code or 0), capsys.readouterr().err


def ended(
    words: Sequence[object], folder: Path, at: int | None = None, prepare: Prepare | None = None
) -> tuple[int, str]:
    """`Command`, waited for."""
    return Command(words, folder, at, prepare).end()
