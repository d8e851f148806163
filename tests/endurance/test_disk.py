"""A disk that fails at any call: one line, exit 2, nothing half-written; with a disk that works the same dump ends."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endurance.events import ALL, Disk, failing
from tests.endurance.processes import ended, here
from tests.endurance.trees import check_honest, contents, put_foreign

ROOT = Path(__file__).parent.parent.parent
GROWING = frozenset({"mkdir", "open", "write", "half", "close"})  # what a full disk refuses; the rest it does
# number -> (which calls fail from the N-th on, how many of them, at each how many-th)
FAULTS: dict[int, tuple[frozenset[str], int | None, int]] = {
    errno.ENOSPC: (GROWING, None, 1),
    errno.EDQUOT: (GROWING, None, 5),
    errno.EIO: (ALL, 1, 1),
    errno.EROFS: (ALL, None, 5),
    errno.EMFILE: (frozenset({"open"}), 1, 1),
}


@pytest.fixture
def words(zoo) -> list[str]:
    stages = ["--stages", "attn_norm,attn_out", "--layers", "0..1"]
    return ["dump", str(zoo("qwen2")), "--tokens", "5,6,7", *stages, "--quiet"]


@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_a_call_that_fails_is_one_line(tmp_path: Path, capsys, words: list[str], number: int) -> None:
    kinds, times, step = FAULTS[number]
    put_foreign(tmp_path / "whole")
    assert here(words, tmp_path / "whole", capsys) == (0, "")
    whole, folder = contents(tmp_path / "whole"), tmp_path / "tree"
    struck = 0
    for at in itertools.count(0, step):
        shutil.rmtree(folder, ignore_errors=True)
        put_foreign(folder)
        disk = Disk(folder, at, failing(number, times), kinds)
        with disk.watched():
            code, said = here(words, folder, capsys)
        if code == 0:
            assert contents(folder) == whole
            if not disk.struck:
                break
            continue  # it was one that may fail
        struck += 1
        full = number == errno.ENOSPC
        assert said.startswith(f"error: {folder}") and ("the disk is full" if full else os.strerror(number)) in said
        assert (code, len(said.splitlines()), ".tmp" in said) == (2, 1, False)
        check_honest(folder, whole)
        if kinds is not ALL:  # files can be removed
            assert not [name for name in contents(folder) if name.endswith(".tmp")]
        assert here(words, folder, capsys) == (0, "")
        assert contents(folder) == whole
    assert struck >= 4


def test_files_may_only_be_so_large(tmp_path: Path, words: list[str]) -> None:
    put_foreign(tmp_path / "tree")
    code, said = ended(list(words), tmp_path / "tree", prepare=_small_files)
    assert code == 2 and said == f"error: {tmp_path}/tree/.unfinished.json: File too large\n"
    assert not [name for name in contents(tmp_path / "tree") if name.endswith((".tmp", ".bin.tmp"))]
    assert ended(list(words), tmp_path / "tree")[0] == 0


def _small_files(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


FULL_DISK = """
mount -t tmpfs -o size=$1k tmpfs "$2" || exit 77
$PYTHON -m jaxref dump tiny --quiet --output "$2/tree"; echo "code $?"
find "$2" -name '*.tmp' -o -name manifest.json
mount -o remount,size=4m "$2"
$PYTHON -m jaxref dump tiny --quiet --output "$2/tree" && cp -r "$2/tree" "$3"
"""


def test_a_real_disk_that_fills_up(tmp_path: Path) -> None:
    """A tmpfs with room for the numbers, but not for the pages that they lie on."""
    (tmp_path / "disk").mkdir()
    shell = ["unshare", "--mount", "sh", "-c", FULL_DISK, "sh", "308", str(tmp_path / "disk"), str(tmp_path / "copy")]
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root and unshare to mount a disk")
    done = subprocess.run(
        shell, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a disk cannot be mounted here")
    assert done.stdout == "code 2\n"
    assert done.stderr.count("\n") == 1 and "the disk is full; free some space" in done.stderr
    assert ended(["dump", "tiny", "--quiet"], tmp_path / "whole") == (0, "")
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
