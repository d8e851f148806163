"""Whole runs on a GPU: the same bytes twice, inside the memory that is allowed, resident or streamed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxref.devices import find_devices
from jaxref.home import to_numpy
from jaxref.made import make_tree
from jaxref.session import Session
from tests.commands import ROOT, command
from tests.conftest import prompt
from tests.gpu.device import DEVICE
from tests.trees import distance, flat, read_tree, tree_bytes
from weights import UserError, open_checkpoint
from weights.tiny import tiny_config, write_random

pytestmark = pytest.mark.gpu
IDS = ",".join(map(str, prompt(40, 272)))

# A dump as the command line does it, then the device's own count of its memory.
MEASURED = """
import json, sys
from click.testing import CliRunner
from jaxref.__main__ import main
from jaxref.devices import find_devices
done = CliRunner().invoke(main, sys.argv[2:], standalone_mode=False, catch_exceptions=False)
stats = find_devices(sys.argv[1])[0].memory_stats() or {}
print(json.dumps({"peak": stats.get("peak_bytes_in_use"), "told": json.loads(done.stdout)}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Eight layers of the 0.5B shape with a small vocabulary: 240 MB in bfloat16, 490 MB in float32."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    write_random(folder, tiny_config("qwen2", "0.5b", 8, vocab_size=4096), seed=1)
    return folder


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", "float16"), ("moe", "float32")])
def test_two_processes_write_the_same_bytes(zoo, tmp_path, name: str, dtype: str) -> None:
    for run in ("one", "two"):
        words = ["--tokens", IDS, "--device", DEVICE, "--dtype", dtype, "--output", tmp_path / run, "--quiet"]
        done = command("dump", zoo(name), *words)
        assert done.returncode == 0, done.stderr
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")
    device = json.loads((tmp_path / "one" / "manifest.json").read_text())["device"]
    assert device["platform"] == ("cpu" if DEVICE == "cpu" else "gpu")


def test_a_model_larger_than_the_memory_is_streamed_inside_it(wide, tmp_path) -> None:
    words = ["dump", str(wide), "--tokens", IDS, "--device", DEVICE, "--json"]
    plan = json.loads(command(*words, "--output", tmp_path / "plan", "--plan").stdout)["device_memory"]
    one = plan["needed"] - plan["layer"]  # so that only one layer at a time has room
    assert one < plan["model"]
    for name, limit in (("free", None), ("one", one)):
        asked = [] if limit is None else ["--max-device-memory", str(limit)]
        measured = [sys.executable, "-c", MEASURED, DEVICE, *words, "--output", str(tmp_path / name), *asked]
        done = subprocess.run(measured, capture_output=True, text=True, cwd=ROOT, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])["peak"]
        assert peak is None or DEVICE == "cpu" or peak <= (limit or plan["needed"]), peak
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "free")
    assert "may be used" in command(*words, "--output", tmp_path / "no", "--max-device-memory", "1MB").stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [("moe", "float32", 40), ("qwen2", "float32", 40), ("qwen3", "float32", 7), ("qwen2", "bfloat16", 7)],
)
def test_a_session_stays_resident_and_has_the_bytes_of_a_dump(zoo, tmp_path, name: str, dtype: str, count: int) -> None:
    """Of a dense model the session runs all layers as one program, the dump stage by stage."""
    folder, tokens = zoo(name), prompt(40, 272)[:count]
    words = ["--tokens", ",".join(map(str, tokens)), "--device", DEVICE, "--dtype", dtype, "--positions", "all"]
    assert command("dump", folder, *words, "--output", tmp_path / "tree", "--quiet").returncode == 0
    made = make_tree(folder, tokens, dtype, positions="all", device=DEVICE)
    with Session(folder, dtype, DEVICE) as session:
        assert session.device == find_devices(DEVICE)[0]
        once, again = flat(session.forward(tokens)), flat(to_numpy(session.forward(tokens)))
    written = read_tree(tmp_path / "tree")
    for path, values in written.items():
        key = path.removesuffix(".bin")
        assert once[key].astype(np.float32).tobytes() == again[key].astype(np.float32).tobytes() == values.tobytes()
        assert np.asarray(made[key], np.float32).tobytes() == values.tobytes()


def test_a_session_that_does_not_fit_is_refused(wide) -> None:
    checkpoint = open_checkpoint(wide)
    with pytest.raises(UserError, match="streams the layers"):
        Session(checkpoint, device=DEVICE, max_memory=100_000_000)
    assert checkpoint.bytes_read == 0


def test_generate_gives_the_tokens_of_the_cpu(zoo) -> None:
    said = [command("generate", zoo("qwen3"), "--tokens", IDS, "--device", device).stdout for device in ("cpu", DEVICE)]
    assert said[0] and said[0] == said[1]


def test_half_precision_is_near_the_cpu(zoo, tmp_path) -> None:
    for device in ("cpu", DEVICE):
        words = ["--tokens", IDS, "--device", device, "--dtype", "float16", "--output", tmp_path / device, "--quiet"]
        assert command("dump", zoo("qwen2"), *words).returncode == 0
    cpu, gpu = read_tree(tmp_path / "cpu"), read_tree(tmp_path / DEVICE)
    assert max(distance(gpu[path], cpu[path]) for path in cpu) <= 5e-3
