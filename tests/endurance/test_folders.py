"""Output paths that cannot be written, or that are odd: one line and exit 2, or a whole tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.endurance.processes import here
from tests.endurance.trees import contents

ROOT = Path(__file__).parent.parent.parent
WORDS: list[object] = ["dump", "tiny", "--tokens", "1,2", "--stages", "attn_norm", "--layers", "0..1", "--quiet"]
# Permissions bind root too, once it may not pass over them.
AS_OTHERS = ["setpriv", "--inh-caps=-dac_override,-dac_read_search", "--bounding-set=-dac_override,-dac_read_search"]


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def occupied(path: Path) -> None:
    path.mkdir()
    (path / "layer-0").write_text("mine")


def folder_for_a_file(path: Path) -> None:
    (path / "layer-0" / "attn_norm.bin").mkdir(parents=True)


REFUSED: dict[Callable[[Path], object], str] = {
    lambda path: path.write_text("mine"): "tree: is a file, not a folder",
    lambda path: path.symlink_to("nowhere"): "tree: is a symbolic link to nothing",
    loop: "tree: is a symbolic link to nothing",
    occupied: "tree/layer-0: File exists",
    folder_for_a_file: "tree: holds layer-0/attn_norm.bin and no manifest",
}


@pytest.mark.parametrize("make", REFUSED, ids=["file", "dangling", "loop", "occupied", "folder"])
def test_a_path_that_is_something_else_is_refused(tmp_path: Path, capsys, make: Callable[[Path], object]) -> None:
    make(tmp_path / "tree")
    code, said = here(WORDS, tmp_path / "tree", capsys)
    assert (code, len(said.splitlines())) == (2, 1) and REFUSED[make] in said
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2100], ids=["name", "path"])
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, capsys, name: str) -> None:
    code, said = here(WORDS, tmp_path / name, capsys)
    assert (code, len(said.splitlines())) == (2, 1) and "File name too long" in said
    assert list(tmp_path.iterdir()) == []


def test_odd_names_are_names_like_others(tmp_path: Path, capsys) -> None:
    assert here(WORDS, tmp_path / "tree", capsys) == (0, "")
    names = ["two\nlines", "x" * 255, "\u65e5\u672c \u00fc", os.fsdecode(b"\xff\xfe"), "-rf", "a/b/../c"]
    for name in names:
        assert here(WORDS, tmp_path / name, capsys) == (0, ""), name
        assert contents(tmp_path / name) == contents(tmp_path / "tree")
    (tmp_path / "link").symlink_to("linked")
    (tmp_path / "linked").mkdir()
    assert here(WORDS, tmp_path / "link", capsys) == (0, "")
    assert contents(tmp_path / "linked") == contents(tmp_path / "tree")


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        (0o555, "tree/.unfinished.json: Permission denied"),
        (0o600, "manifest.json: not readable as JSON: Permission denied"),
    ],
    ids=["no-writing", "no-entering"],
)
def test_a_folder_without_permission(tmp_path: Path, mode: int, says: str) -> None:
    folder = tmp_path / "tree"
    folder.mkdir(mode=mode)
    drop = AS_OTHERS if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("permissions do not bind root, and there is no setpriv")
    done = subprocess.run(
        [*drop, sys.executable, "-m", "jaxref", *map(str, WORDS), "--output", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if "setpriv:" in done.stderr:
        pytest.skip("permissions do not bind root, and setpriv may not change that here")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    folder.chmod(0o700)
    assert list(folder.iterdir()) == []
