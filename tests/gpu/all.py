"""Every GPU check and benchmark in one call of less than ten minutes.

    python -m tests.gpu.all [--device cuda] [--small] [--scratch DIR] [--json FILE] [--minutes 9.5]

Runs the tests of this folder, then measures jaxref and Hugging Face eager with hooks on random checkpoints of the 0.5B
and the 7B shape, and prints card, versions and figures. What the time does not suffice for is said and left out.
`--small --device cpu` shows on any machine that the script works; its figures mean nothing. Exit 0: all tests passed
and all was measured, 1: not so, 2: no such device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.gpu.table import figures

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("jaxref", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "transformers", "numpy")
TESTS = 270  # seconds that the tests may take
SHAPES = {"7b": "7", "0.5b": "7,512"}  # and numbers of tokens; first what must be known if time runs out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny shapes and few repetitions, to try the script")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints go, 17 GB; kept if given")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", choices=["tests", "models"], help="half of it, where one call is too short for both")
    asked = parser.parse_args()
    check_device(asked.device)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(asked.device, asked.small, asked.scratch or Path(scratch), time.monotonic() + 60 * asked.minutes)
        found = {"machine": machine(asked.device), "tests": "not asked for", "models": {}}
        writing = run.write_models() if asked.only != "tests" else None  # beside the tests, which use the card
        if asked.only != "models":
            found["tests"] = run.tests()
        if writing is not None:
            found["models"] = run.models(writing)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(figures(found)), flush=True)
    sys.exit(0 if found["tests"] in ("passed", "not asked for") and not run.left_out else 1)


def check_device(name: str) -> None:
    """End with one line and 2 where there is none. In a process of its own, which gives the card back."""
    script = f"from jaxref.devices import find_devices; find_devices({name!r})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        print(f"error: no GPU to test on: {lines[-1].removeprefix('weights.errors.UserError: ')}", file=sys.stderr)
        sys.exit(2)


def machine(device: str) -> dict[str, str]:
    """Card, driver and versions."""
    found = {"python": sys.version.split()[0], "cpus": str(os.cpu_count())}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            found["card"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found["card"] = f"not known ({error})"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Run:
    """The steps, each in a process of its own and none longer than what is left of the time."""

    def __init__(self, device: str, small: bool, scratch: Path, end: float) -> None:
        self.device, self.small, self.scratch, self.end = device, small, scratch, end
        self.left_out: list[str] = []

    def step(self, name: str, words: list[str], limit: float = 600) -> str | None:
        """The last line that a command prints; None, and a line about it, where it fails or there is no time."""
        left = self.end - time.monotonic()
        print(f"[{left:4.0f} s left] {name}", file=sys.stderr, flush=True)
        environment = os.environ | {"JAXREF_GPU_DEVICE": self.device}
        try:
            done = subprocess.run(
                words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=max(1, min(left, limit))
            )
        except subprocess.TimeoutExpired:
            return self._failed(f"{name}: no time")
        if done.returncode:
            print(done.stdout[-8000:], file=sys.stderr, flush=True)
            return self._failed(f"{name}: exit {done.returncode}")
        return (done.stdout.strip().splitlines() or [""])[-1]

    def _failed(self, reason: str) -> None:
        self.left_out.append(reason)
        print(f"  left out: {reason}", file=sys.stderr, flush=True)

    def tests(self) -> str:
        said = self.step("tests", [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/gpu"], TESTS)
        return "failed" if said is None else "passed" if "skipped" not in said else f"not all ran: {said}"

    def write_models(self) -> subprocess.Popen[bytes]:
        """Begin to write the checkpoints; `--small` takes the 0.5B's layers for the 7B's too."""
        changes = ", num_hidden_layers=2, vocab_size=2048" if self.small else ""
        calls = [
            f"write_fast(Path({str(self.scratch / like)!r}), {'0.5b' if self.small else like!r}{changes})"
            for like in SHAPES
        ]
        return subprocess.Popen([sys.executable, "-c", "from tests.gpu.models import *; " + "; ".join(calls)], cwd=ROOT)

    def models(self, writing: subprocess.Popen[bytes]) -> dict[str, Any]:
        """The figures of each shape, once its checkpoint is there."""
        found: dict[str, Any] = {"bandwidth": self._bench("bandwidth", [])}
        if writing.wait():
            self._failed("the checkpoints could not be written")
            return found | {"left out": self.left_out}
        for like, tokens in SHAPES.items():
            words = [str(self.scratch / like), "--tokens", "7" if self.small else tokens]
            found[like] = {side: self._bench(side, words) for side in ("session", "hf", "jit")}
        for like in reversed(SHAPES):
            found[like]["processes"] = self._processes(self.scratch / like)
        return found | {"left out": self.left_out}

    def _bench(self, side: str, words: list[str]) -> Any:
        repeat = "2" if self.small else "10"
        command = [sys.executable, "-m", "tests.gpu.bench", side, *words, "--device", self.device, "--repeat", repeat]
        said = self.step(f"{side} {' '.join(words)}", command)
        return None if said is None else json.loads(said)

    def _processes(self, folder: Path) -> dict[str, float | None]:
        """Seconds of whole processes that write all stages of 7 tokens; of jaxref the second, with compiled stages."""
        found: dict[str, float | None] = {}
        tokens = ["--tokens", "1,2,3,4,5,6,7", "--device", self.device, "--quiet"]
        for number, program in enumerate(("jaxref dump", "jaxref dump", "oracle hf")):
            output = str(self.scratch / f"{folder.name}-{number}")
            words = [sys.executable, "-m", *program.split(), str(folder), *tokens, "--output", output]
            begun = time.perf_counter()
            said = self.step(f"{folder.name}: {program}", words)
            found[program] = None if said is None else time.perf_counter() - begun
        return found


if __name__ == "__main__":
    main()
