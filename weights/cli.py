"""How every command line of this project ends: 0, or one line on stderr and 2; 130 after Ctrl-C, 141 in `| head`."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

import click

from weights.errors import UserError

# Of a reader that went away, as shells number SIGPIPE: what was still to be said may have been a failure.
UNREAD = 141


def run(command: click.Command) -> NoReturn:
    """Run a command and leave the process. Any input, however broken, ends in one line, never in a traceback."""
    _open_streams()
    # Importing JAX makes objects by the hundred thousand, and none of them goes: looking for garbage costs 0.1 s.
    gc.set_threshold(100_000)
    # A job scheduler's SIGTERM must leave no half file either; SIGALRM is what `_interrupt` asks for.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _again
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need be no text, and is printed all the same
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: Any = command.main(standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; nothing half-written is left, the same command finishes it", 130)
    except (BrokenPipeError, SystemExit):  # click and rich leave by themselves where a pipe is broken
        _leave(UNREAD)
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            print(error.format_message(), file=sys.stderr, flush=True)
        _leave(2)
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _fail(error.format_message() + hint, 2)
    except (UserError, click.ClickException) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(_describe(error), 2)
    except MemoryError as error:
        _fail(f"not enough memory: {error}", 2)
    _leave(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """What a shell closed (`>&-`) goes nowhere; else the next file that is opened would take its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - open to the end


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the work, but no import: modules in C that are broken off as they begin end in a crash, not in a line."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _again(lost: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that comes in a destructor is dropped there by Python, so it is asked for once more."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(lost)


def _leave(code: int) -> NoReturn:
    """The work is done: Ctrl-C in the interpreter's last moments would only print what it broke off there."""
    gc.freeze()  # as the interpreter ends it would look through all that there is, for 0.1 s
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    sys.exit(code)


def _drop_unwritable(stream: TextIO) -> None:
    """What cannot be written (a full disk, a reader that went away) Python would try again at its end, and exit 120."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _describe(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"{error.filename or 'output'}: the disk is full; free some space and run the same command again"
    return f"{error.filename or 'input or output'}: {error.strerror or error}"


def _fail(message: str, code: int) -> NoReturn:
    words = " ".join(message.split())
    # A file's name or a value in it may hold what a terminal obeys.
    with suppress(OSError):  # a full disk under stderr: the exit code still tells
        print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words), file=sys.stderr, flush=True)
    _leave(code)
