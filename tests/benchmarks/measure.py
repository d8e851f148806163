"""What the benchmarks share: whole processes measured from start to end, random models, token files, medians.

Nothing heavy is imported: Linux counts a parent's peak memory into that of its children.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TENSORS = (".bin", ".safetensors")


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time and of all its threads, peak resident MB, what its output folder holds."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    size: int = 0  # bytes, of all files
    tensors: int = 0  # files that hold one


class Failed(SystemExit):
    """A process that did not end well, with the reason in one line; uncaught it ends the benchmark with that line."""


def measure(
    command: Sequence[str | Path],
    output: Path | None = None,
    *,
    accept: Sequence[int] = (0,),
    limit: float | None = None,
    memory: int | None = None,
    environment: Mapping[str, str] | None = None,
    touch: float = 0.0,
) -> Run:
    """Run a command to its end. `output` is removed before, and the disk has caught up before the clock starts.

    `limit` is in seconds, `memory` in bytes of private memory, `touch` in GB (`touch_memory`). Raises `Failed` for an
    exit code not in `accept`.
    """
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what the process before wrote must not slow this one's writing
    touch_memory(touch)
    cap = None if memory is None else partial(resource.setrlimit, resource.RLIMIT_DATA, (memory, memory))
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        begun = time.perf_counter()
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=cap,
        )
        timer = threading.Timer(limit or 0, process.kill)
        if limit:
            timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in accept:
            said.seek(0)
            late = limit is not None and seconds >= limit
            reason = f"stopped after {limit:g} s" if late else _reason(process.returncode, said.read())
            raise Failed(f"{Path(words[0]).name} {' '.join(words[1:4])}: {reason}")
    files = [] if output is None else [file for file in output.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    tensors = sum(file.suffix in TENSORS for file in files)
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, size, tensors)


def touch_memory(gigabytes: float) -> None:
    """Write to so much of the free memory, in a process that ends.

    The host of a virtual machine takes back what lies idle, and whoever asks for it next pays 1 to 2 s a GB. It is paid
    here, before each run, for all programs alike.
    """
    size = int(min(1e9 * gigabytes, 0.8 * free_memory()))
    if size:
        subprocess.run([sys.executable, "-c", _TOUCH, str(size)], check=True)


_TOUCH = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, len(memory))
"""


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def _reason(code: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"exit {code}: {lines[-1][:200] if lines else 'nothing on stderr'}"


def medians(runs: Sequence[Run]) -> Run:
    """Of each column by itself."""
    middle = statistics.median
    return Run(
        middle(run.seconds for run in runs),
        middle(run.cpu_seconds for run in runs),
        middle(run.peak_mb for run in runs),
        int(middle(run.size for run in runs)),
        int(middle(run.tensors for run in runs)),
    )


def random_model(folder: Path, *options: str) -> Path:
    """A random checkpoint by `python -m weights tiny`, with a tokenizer, which some programs insist on."""
    if not (folder / "config.json").exists():
        _weights("tiny", str(folder), *options)
    if not (folder / "tokenizer.json").exists():
        with tempfile.TemporaryDirectory() as scratch:
            _weights("tiny", f"{scratch}/small")
            for file in Path(scratch, "small").glob("tokenizer*"):
                shutil.copy(file, folder)
    return folder


def _weights(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "weights", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def write_tokens(folder: Path, model: Path, count: int) -> Path:
    """A file of `count` token ids of this model, by commas."""
    size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    path = folder / f"tokens-{count}"
    path.write_text(",".join(str((1000 + i) % size) for i in range(count)), encoding="utf-8")
    return path


def into_page_cache(files: Sequence[Path]) -> None:
    """Read files once, so that every program finds them in memory."""
    piece = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def dump_command(model: Path, tokens: Path, output: Path) -> list[str]:
    """`python -m jaxref dump` of all stages."""
    return [sys.executable, "-m", "jaxref", "dump", str(model), "--tokens-file", str(tokens), "--output", str(output)]


def lean_command(model: Path, tokens: Path, output: Path) -> list[str]:
    """Hugging Face eager with hooks writing the same files and nothing else."""
    return [sys.executable, "-m", "tests.benchmarks.peers.run_hooks", str(model), str(tokens), str(output)]
