"""Two hundred dumps in one process, with `compare` and `localize` between: `python -m tests.endurance.soak`.

After a warm-up, in which every shape and dtype is compiled, nothing may grow: memory, threads, descriptors, maps.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import click

from oracle import compare
from oracle.localize import localize
from tests.conftest import prompt
from tests.trees import write_tree
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

CYCLE = 6  # dumps, until lengths and dtypes come again
# Beyond which each has grown; the others must not grow at all. Parameters of a layer are 2 or 4 MB.
MOST = {"used": 4_000_000, "resident": 40_000_000, "maps": 8}
LENGTHS, DTYPES = (3, 20), ("float32", "float16", "float64")


class Allocated(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d hblkhd f g uordblks h i".split()]


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment.

    `used` are the bytes that somebody allocated and did not free; a leak shows there to the kilobyte. `resident` goes
    up and down by tens of megabytes with the holes between them.
    """

    used: int
    resident: int
    threads: int
    descriptors: int
    maps: int

    @staticmethod
    def now() -> Held:
        """Measured after what is garbage is gone and free memory is given back."""
        gc.collect()
        library, process = ctypes.CDLL(None), Path("/proc/self")
        library.malloc_trim(0)
        library.mallinfo2.restype = Allocated
        allocated = library.mallinfo2()
        resident = int((process / "statm").read_text().split()[1]) * resource.getpagesize()
        counts = len(list((process / "fd").iterdir())), len((process / "maps").read_text().splitlines())
        return Held(allocated.uordblks + allocated.hblkhd, resident, threading.active_count(), *counts)

    @staticmethod
    def least(several: Sequence[Held]) -> Held:
        """The least of each."""
        return Held(*map(min, zip(*map(astuple, several), strict=True)))

    def grown(self, after: Held) -> list[str]:
        """What has grown by more than it may."""
        then, now = asdict(self), asdict(after)
        return [
            f"{name} grew from {then[name]:,} to {now[name]:,}"
            for name in then
            if now[name] - then[name] > MOST.get(name, 0)
        ]

    def __str__(self) -> str:
        memory = f"{self.used / 1e6:.2f} MB used, {self.resident / 1e6:.1f} MB resident"
        return f"{memory}, {self.threads} threads, {self.descriptors} descriptors, {self.maps} maps"


def soak(dumps: int, warm: int, judged: int, tell: Callable[[int], None] = lambda number: None) -> tuple[Held, Held]:
    """What is held after `warm` dumps and after all of them; `judged` times compare and localize run between.

    Each is the least of a cycle of lengths and dtypes, since what the allocator keeps goes up and down by megabytes.
    """
    held = []
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(name) / "model"
        write_random(model, tiny_config("qwen3", None, 3, hidden_size=256, intermediate_size=768))
        for output, dtype in (("truth", "float64"), ("engine", "float32")):
            write_tree(model, folder / output, prompt(7, 272), dtype=dtype)
        for number in range(dumps):
            tokens, dtype = prompt(LENGTHS[number % 2], 272), DTYPES[number // 2 % 3]
            write_tree(model, folder / "tree", tokens, dtype=dtype)
            shutil.rmtree(folder / "tree")
            if number % max(1, dumps // judged) == 0:
                compare(folder / "truth", folder / "engine")
                localize(open_checkpoint(model), folder / "engine")
            held.append(Held.now())
            tell(number)
    return Held.least(held[warm : warm + CYCLE]), Held.least(held[-CYCLE:])


@click.command(help=__doc__)
@click.option("--dumps", type=click.IntRange(min=2), default=200, show_default=True)
@click.option("--warm", type=click.IntRange(min=1), default=50, show_default=True, help="Dumps before it is measured.")
@click.option(
    "--judged", type=click.IntRange(min=1), default=50, show_default=True, help="Runs of compare and localize."
)
def main(dumps: int, warm: int, judged: int) -> None:
    def tell(number: int) -> None:
        if number % 25 == 0:
            print(f"after {number:3} dumps: {Held.now()}", flush=True)

    before, after = soak(dumps, warm, judged, tell)
    print(f"after {warm} dumps: {before}\nafter {dumps} dumps: {after}")
    grown = before.grown(after)
    print("; ".join(grown) or f"nothing grew (used {(after.used - before.used) / 1e6:+.2f} MB)")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
