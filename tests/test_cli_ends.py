"""How a command ends before its work is done: Ctrl-C, a full disk, a reader that goes away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxref import stage_file
from tests.commands import ROOT, refused
from tests.trees import read_tree, tree_bytes, write_tree
from weights.tiny import tiny_config, write_random


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch, zoo) -> None:
    import shutil

    from weights import UserError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="the disk has 1,000 left"):
        write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    assert not (tmp_path / "tree").exists()


def test_a_disk_that_fills_up_leaves_no_half_file_and_the_same_dump_finishes(tmp_path, monkeypatch, zoo) -> None:
    write_tree(zoo("qwen2"), tmp_path / "whole", [1, 2, 3])
    put, calls = stage_file.StageFile._put, []

    def full(self, data) -> None:
        calls.append(1)
        if len(calls) > 61:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(stage_file.StageFile, "_put", full)
        with pytest.raises(OSError, match="No space left"):
            write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    names = [path.name for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert "manifest.json" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert ".unfinished.json" in names
    # Two threads write, so how many files are whole varies a little; that each one is does not.
    assert 28 <= len(read_tree(tmp_path / "tree")) <= 30
    write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    assert tree_bytes(tmp_path / "tree") == tree_bytes(tmp_path / "whole")
    assert not (tmp_path / "tree" / ".unfinished.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_jax_is_imported_waits_for_its_end(tmp_path: Path, number: int) -> None:
    # Stands before JAX, whose modules in C end in a crash where Python code that they run is broken off.
    (tmp_path / "jax.py").write_text(
        f"import os, pathlib, sys\nos.kill(os.getpid(), {int(number)})\nfor _ in range(9**5): pass\n"
        f"pathlib.Path(__file__).with_suffix('.whole').touch()\nsys.path.remove({str(tmp_path)!r})\n"
        "del sys.modules['jax']\nimport jax\n"
    )
    words = [sys.executable, "-m", "jaxref", "dump", "tiny", "--output", str(tmp_path / "tree")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (tmp_path / "jax.whole").exists()
    assert (ended.returncode, ended.stderr.strip()) == (
        130,
        "error: interrupted; nothing half-written is left, the same command finishes it",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_dump_leaves_no_manifest_and_no_half_file(tmp_path: Path, number: int) -> None:
    write_random(tmp_path / "m", tiny_config("qwen2", "0.5b", 12, vocab_size=512))
    words = [sys.executable, "-m", "jaxref", "dump", str(tmp_path / "m"), "--output", str(tmp_path / "tree")]
    words += ["--tokens", ",".join(str(i) for i in range(400))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT, text=True)
    while not (tmp_path / "tree" / "layer-2").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in err
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert files and not [path for path in files if path.suffix == ".tmp" or path.name == "manifest.json"]
    assert all(len(path.read_bytes()) % 4 == 0 for path in files if path.suffix == ".bin")
    assert "another dump (tokens differ)" in refused(
        "dump", tmp_path / "m", "--tokens", "1", "--output", tmp_path / "tree"
    )
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "tree" / "manifest.json").exists()


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m jaxref dump --output {tmp_path}/t | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("embedded")
