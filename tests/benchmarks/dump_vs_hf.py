"""Whole processes side by side: `python -m jaxref dump` against Hugging Face eager with hooks writing the same stages.

    python tests/benchmarks/dump_vs_hf.py [MODEL] [--tokens 7,512] [--repeat 3]

Without MODEL a random checkpoint of the 0.5B shape is made. Run it by hand on a quiet machine; it is no test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def measure(command: list[str], output: Path) -> tuple[float, float, int]:
    """Seconds, peak resident MB and bytes written of one process, from its start to its end."""
    shutil.rmtree(output, ignore_errors=True)
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    size = sum(file.stat().st_size for file in output.rglob("*.bin"))
    return seconds, usage.ru_maxrss / 1e3, size


def commands(model: Path, tokens: str, output: Path) -> dict[str, list[str]]:
    """What is compared; every process writes the same stages of all layers as APRT files."""
    return {
        "jaxref dump": [
            sys.executable,
            "-m",
            "jaxref",
            "dump",
            str(model),
            "--tokens",
            tokens,
            "--output",
            str(output),
        ],
        "HF eager + hooks": [sys.executable, str(HERE / "hf_dump.py"), str(model), tokens, str(output)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", default="7,512")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            # In a process of its own: Linux counts a parent's peak memory into that of its children.
            subprocess.run([sys.executable, "-m", "weights", "tiny", str(model), "--like", "0.5b"], check=True)
        for count in map(int, options.tokens.split(",")):
            tokens = ",".join(str(1000 + i) for i in range(count))
            runs: dict[str, list[tuple[float, float, int]]] = {}
            for _ in range(options.repeat):
                for name, command in commands(model, tokens, Path(scratch) / "tree").items():
                    runs.setdefault(name, []).append(measure(command, Path(scratch) / "tree"))
            report(count, runs)


def report(count: int, runs: dict[str, list[tuple[float, float, int]]]) -> None:
    """Medians, and how many times as fast as the last one the first is."""
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()}
    for name, (seconds, memory, size) in medians.items():
        print(f"{count:5} tokens  {name:18} {seconds:6.2f} s  {memory:7.0f} MB peak  {size / 1e6:8.1f} MB written")
    ours, theirs = (row[0] for row in medians.values())
    print(f"{count:5} tokens  ratio {theirs / ours:.2f}\n")


if __name__ == "__main__":
    main()
