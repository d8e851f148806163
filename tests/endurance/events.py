"""Every change that a dump makes on the disk below a folder, one by one, and something done at the N-th of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, main_thread
from typing import Any, NamedTuple
from unittest.mock import patch


class Event(NamedTuple):
    """`what` is about to happen to a file or folder: mkdir, open, write, half (of a write), close, rename or unlink."""

    what: str
    path: Path


ALL = frozenset({"mkdir", "open", "write", "half", "close", "rename", "unlink"})


class Crash(BaseException):
    """The process is dead as far as the disk can tell."""


class Disk:
    """Counts the events of some kinds below `folder`, and calls `act` with each from the `at`-th on, counted from 0."""

    def __init__(
        self, folder: Path, at: int | None, act: Callable[[Disk, Event], None], kinds: frozenset[str] = ALL
    ) -> None:
        self.folder, self.at, self.act, self.kinds = folder, at, act, kinds
        self.seen: list[Event] = []
        self.open: list[Any] = []
        self._lock = RLock()

    @property
    def struck(self) -> bool:
        """Whether the N-th event came."""
        return self.at is not None and len(self.seen) > self.at

    def event(self, what: str, path: Any) -> None:
        """Count one, if it is below the folder."""
        place = Path(os.fspath(path))
        if what not in self.kinds or (place != self.folder and self.folder not in place.parents):
            return
        with self._lock:
            self.seen.append(Event(what, place))
            if self.struck:
                self.act(self, self.seen[-1])

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Stand in for the functions that change a disk, as `pathlib` calls them."""
        names = {"replace": "rename", "unlink": "unlink", "mkdir": "mkdir"}
        replaced = [patch.object(os, name, self._counted(getattr(os, name), what)) for name, what in names.items()]
        replaced.append(patch.object(io, "open", self._opening(io.open)))
        for each in replaced:
            each.start()
        try:
            yield self
        finally:
            for each in replaced:
                each.stop()

    def _counted(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(path: Any, *rest: Any, **options: Any) -> Any:
            self.event(what, path)
            return function(path, *rest, **options)

        return counted

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wxa+"):
                return function(path, mode, *rest, **options)
            self.event("open", path)
            file = _File(self, function(path, mode, *rest, **options), Path(path))
            self.open.append(file)
            return file

        return opening


class _File:
    """A file whose writes and whose end are events."""

    def __init__(self, disk: Disk, file: Any, path: Path) -> None:
        self._disk, self._file, self._path = disk, file, path

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._disk.event("write", self._path)
        self._file.write(data[:half])
        self._file.flush()
        self._disk.event("half", self._path)
        return half + self._file.write(data[half:])

    def close(self) -> None:
        if not self._file.closed:
            self._disk.event("close", self._path)
        self._file.close()

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def kill(disk: Disk, event: Event) -> None:
    """End the process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(disk: Disk, event: Event) -> None:
    """Leave the disk as `kill -9` would: what is buffered is lost, and no clean-up reaches a file any more."""
    null = os.open(os.devnull, os.O_RDWR)
    for file in disk.open:
        if not file.closed:
            os.dup2(null, file.fileno())
    os.close(null)
    raise Crash


def failing(number: int, times: int | None = None) -> Callable[[Disk, Event], None]:
    """Let the calls fail with this `errno`: for ever (a full disk), or a few times."""

    def fail(disk: Disk, event: Event) -> None:
        assert disk.at is not None
        if times is None or len(disk.seen) <= disk.at + times:
            named = () if event.what in ("write", "half", "close") else (str(event.path),)  # as the system does
            raise OSError(number, os.strerror(number), *named)

    return fail


def interrupt(disk: Disk, event: Event) -> None:
    """Let Ctrl-C reach the main thread once, as the system does."""
    if disk.at == len(disk.seen) - 1:
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
