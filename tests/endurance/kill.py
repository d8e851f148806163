"""Kill a real dump at every change that it makes on the disk: `python -m tests.endurance.kill`.

After each kill the folder must be honest, another command must be refused, and the same command must finish with the
bytes of a dump that nobody disturbed.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from jaxref.tree import UNFINISHED
from tests.endurance.processes import Prepare, ended, small_blocks
from tests.endurance.trees import check_honest, contents, put_foreign
from weights.tiny import tiny_config, write_random

# name -> (architecture, layers, options, what the process does before)
CASES: dict[str, tuple[str, int, list[object], Prepare | None]] = {
    "aprt": ("qwen2", 2, [], None),
    "blocks": ("qwen2", 1, ["--stages", "attn_scores,attn_out"], small_blocks),
    "safetensors": ("qwen3", 2, ["--format", "safetensors"], None),
    "moe": ("qwen3_moe", 2, ["--dtype", "bfloat16"], None),
}


def check_kill(words: list[object], folder: Path, at: int, whole: dict[str, bytes], prepare: Prepare | None) -> bool:
    """Kill at the N-th event and look at everything; False where the dump ended before it."""
    shutil.rmtree(folder, ignore_errors=True)
    put_foreign(folder)
    code, said = ended(words, folder, at, prepare)
    if code == 0:
        assert contents(folder) == whole
        return False
    assert (code, said) == (-signal.SIGKILL, "")
    check_honest(folder, whole)
    if (folder / UNFINISHED).exists():
        code, said = ended([*words, "--dtype", "float64"], folder, None, prepare)
        assert code == 2 and "holds another dump (dtype differ)" in said and len(said.splitlines()) == 1
    assert ended(words, folder, None, prepare) == (0, "")
    assert contents(folder) == whole
    return True


def run_case(name: str, folder: Path, every: int, first: int = 0) -> tuple[int, int]:
    """Kills and files of one case; kills at every N-th event from the `first` on."""
    arch, layers, options, prepare = CASES[name]
    write_random(folder / "model", tiny_config(arch, None, layers))
    words: list[object] = ["dump", folder / "model", "--tokens", "5,6,7,8,9", "--quiet", *options]
    put_foreign(folder / "whole")
    assert ended(words, folder / "whole", None, prepare) == (0, "")
    whole, at = contents(folder / "whole"), first
    while check_kill(words, folder / "tree", at, whole, prepare):
        at += every
        if sys.stderr.isatty():
            print(f"\r{name}: {at} events", end="", file=sys.stderr, flush=True)
    return (at - first) // every, len(whole)


@click.command(help=__doc__)
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Some of them.")
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Kill at each N-th event.")
def main(cases: tuple[str, ...], every: int) -> None:
    for name in cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            kills, files = run_case(name, Path(folder), every)
        print(f"\r{name}: {kills} kills of a dump of {files} files; each folder was honest and was finished")


if __name__ == "__main__":
    main()
