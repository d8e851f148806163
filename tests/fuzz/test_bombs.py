"""Inputs that claim much or mean two things: refused, at once and in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxref.loaded import load_tree
from oracle.comparer import compare
from tests.fuzz.attempt import TARGETS, attempt, warm
from tests.fuzz.bombs import bombs, gguf_bombs, two_names
from tests.fuzz.world import World
from weights import UserError, open_checkpoint, read_config
from weights.gguf_file import GgufFile
from weights.tiny import tiny_config

ROOT = Path(__file__).parents[2]


def test_no_claim_is_believed(world: World) -> None:
    """Refused in little memory: `attempt` counts what Python and NumPy allocate."""
    for target in TARGETS.values():
        warm(target, world)
    for target, name, data in bombs(world):
        outcome = attempt(TARGETS[target], world, data)
        assert outcome.kind == "refused", (target, name, outcome)
        assert len(outcome.words) < 20_000, (target, name)


def test_nor_by_what_is_not_written_in_python(tmp_path: Path) -> None:
    """The same with the process's own address space limited: what Rust and C allocate counts too."""
    program = (
        "import resource, sys; from pathlib import Path; from tests.fuzz.attempt import TARGETS, attempt, warm\n"
        "from tests.fuzz.bombs import bombs; from tests.fuzz.world import World\n"
        "world = World(Path(sys.argv[1])); [warm(target, world) for target in TARGETS.values()]\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)\n"
        "kinds = {attempt(TARGETS[t], world, data, measured=False).kind for t, _, data in bombs(world)}\n"
        "print(kinds)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "{'refused'}"), done.stderr[-2000:]


def test_numbers_take_no_more_memory_than_in_the_file(tmp_path: Path) -> None:
    import tracemalloc

    data = gguf_bombs()["numbers"]
    (tmp_path / "n.gguf").write_bytes(data)
    tracemalloc.start()
    metadata = GgufFile(tmp_path / "n.gguf").metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(metadata["k"]) == 1 << 20
    assert peak < 3 * len(data) + (1 << 16)


def test_one_tensor_in_two_shards_is_ambiguous(root: Path) -> None:
    folder = root / "sharded"
    for name in ("a", "b"):
        tensors = {key: value for key, value in _tensors(folder / f"{name}.safetensors").items()}
        save_file(tensors | {"model.norm.weight": np.ones(8, np.float32)}, folder / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"more than one file holds: model\.norm\.weight"):
        open_checkpoint(folder)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def test_two_names_of_one_tensor_are_ambiguous(tmp_path: Path) -> None:
    """In a GGUF, a tensor may be called as Hugging Face calls another."""
    (tmp_path / "x.gguf").write_bytes(two_names())
    with pytest.raises(UserError, match=r"'model\.norm\.weight', which is there already"):
        GgufFile(tmp_path / "x.gguf")


def test_a_layer_named_often_is_named_once(root: Path) -> None:
    """A long list would be walked through for each layer."""
    config = root / "model" / "config.json"
    config.write_text(json.dumps(tiny_config("qwen3_moe") | {"mlp_only_layers": [1, 0] * 1000}))
    assert read_config(config).mlp_only_layers == (1, 0)


def test_two_folders_of_one_layer_are_ambiguous(root: Path) -> None:
    shutil.copytree(root / "tree" / "layer-0", root / "tree" / "layer-00")
    with pytest.raises(UserError, match="the same layer"):
        load_tree(root / "tree")
    with pytest.raises(UserError, match="the same stage"):
        compare(root / "reference", root / "tree")
