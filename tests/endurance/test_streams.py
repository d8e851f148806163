"""Streams that are closed or full, a cache that cannot be kept, and Ctrl-C where Python drops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.endurance.processes import ended
from tests.endurance.test_folders import AS_OTHERS, WORDS
from tests.endurance.trees import contents

ROOT = Path(__file__).parent.parent.parent


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's line; `DUMP` in it is a dump into `folder`, `PYTHON` the interpreter, whose streams are buffered."""
    words = [sys.executable, "-m", "jaxref", *map(str, WORDS), "--output", str(folder)]
    line = command.replace("DUMP", " ".join(words)).replace("PYTHON", sys.executable)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=buffered | environment, check=False
    )


def test_closed_streams_do_no_harm(tmp_path: Path) -> None:
    loud = "DUMP >&- 2>&- <&-".replace("DUMP", f"{sys.executable} -m jaxref dump tiny --output {tmp_path}/loud")
    assert shell(loud, tmp_path / "loud").returncode == 0
    assert ended(["dump", "tiny", "--quiet"], tmp_path / "tree") == (0, "")
    assert contents(tmp_path / "loud") == contents(tmp_path / "tree")
    done = shell("DUMP --dtype float64 2>&-", tmp_path / "loud")
    assert (done.returncode, done.stdout) == (2, "")  # not a word of the error on stdout
    assert shell("DUMP --dtype float64 2>/dev/full", tmp_path / "loud").returncode == 2


@pytest.mark.parametrize("command", ["jaxref stages", "weights inspect tiny", "oracle --help"])
def test_a_full_disk_under_stdout_is_one_line(tmp_path: Path, command: str) -> None:
    done = shell(f"PYTHON -m {command} >/dev/full", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "the disk is full" in done.stderr
    assert shell(f"PYTHON -m {command} >/dev/full 2>/dev/full", tmp_path).returncode == 2


def test_help_for_nobody_is_wrong_use_all_the_same(tmp_path: Path) -> None:
    assert shell("PYTHON -m jaxref 2>/dev/full", tmp_path).returncode == 2


def test_a_reader_that_goes_away_hides_no_divergence(tmp_path: Path) -> None:
    """Neither 0, which would say that two trees agree, nor 1 or 2, but what shells make of SIGPIPE."""
    assert shell("DUMP", tmp_path / "tree").returncode == 0
    compare = f"PYTHON -m oracle compare {tmp_path}/tree {tmp_path}/tree"
    done = shell(f"{compare} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_a_cache_that_cannot_be_kept_is_one_line_and_the_dump_is_made(tmp_path: Path, home: str) -> None:
    done = shell("env -u JAX_COMPILATION_CACHE_DIR DUMP", tmp_path / "tree", XDG_CACHE_HOME=home)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("warning: no cache for what is compiled")


def test_a_damaged_cache_is_not_told_of(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = shell("env -u JAX_COMPILATION_CACHE_DIR DUMP", tmp_path / name, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert (done.returncode, done.stderr) == (0, "")
        entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        for path in entries:
            path.write_bytes(b"damaged")
    assert entries and contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_folder_that_may_not_be_written_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    drop = " ".join(AS_OTHERS) if os.geteuid() == 0 else ""
    done = shell(
        f"env -u JAX_COMPILATION_CACHE_DIR {drop} DUMP", tmp_path / "tree", XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    if "setpriv" in done.stderr:
        pytest.skip("permissions do not bind root, and setpriv may not change that here")
    assert done.returncode == 0 and "no cache for what is compiled" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def interrupted_in_a_destructor(folder: Path) -> None:
    """Send Ctrl-C from a destructor as the embedding begins, and let the work last until it is sent once more."""
    from jaxref.reader import Reader

    class Gone:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass  # here it is raised

    embed = Reader.embed

    def embedding(self: Reader, tokens: list[int]):
        del_me = Gone()
        del del_me
        time.sleep(30)  # broken off; four tiny layers alone may be done before the signal comes again
        return embed(self, tokens)

    Reader.embed = embedding


def test_ctrl_c_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    words = ["dump", "tiny", "--quiet", "--tokens", ",".join(map(str, range(200)))]
    code, said = ended(words, tmp_path / "tree", prepare=interrupted_in_a_destructor)
    assert (code, said.strip().startswith("error: interrupted"), len(said.split("\n")) <= 3) == (130, True, True), said
