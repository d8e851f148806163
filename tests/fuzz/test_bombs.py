"""Inputs made by hand: claims that no file keeps, pipes, devices and links, and names that lead out of a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxref.aprt import read_aprt
from jaxref.loaded import load_tree
from jaxref.tree import read_manifest
from oracle.comparer import Options, compare
from oracle.trees import open_tensor
from tests.fuzz.attempt import TARGETS, attempt, time_limit, warm
from tests.fuzz.bombs import bombs, gguf_bombs, two_names
from tests.fuzz.world import INDEX, World
from weights import UserError, open_checkpoint, open_tokenizer, read_config
from weights.gguf_file import GgufFile
from weights.tiny import tiny_config

# A folder may lack these, and a link that leads nowhere is nothing.
NOWHERE = ("loop", "link to nothing")
OPTIONAL = {"tokenizer": NOWHERE, "settings": NOWHERE, "template": NOWHERE, "manifest": ("link to nothing",)}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = World(tmp_path_factory.mktemp("bombs"))
    for target in TARGETS.values():
        warm(target, found)
    return found


def test_no_claim_is_believed(world: World) -> None:
    """Refused in little memory: `attempt` counts what Python and NumPy allocate."""
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


def _templated(folder: Path) -> None:
    found = open_tokenizer(folder)
    assert found is not None
    found.templated()


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("model/config.json", lambda root: read_config(root / "model" / "config.json")),
    "weights": ("model/model.safetensors", lambda root: open_checkpoint(root / "model")),
    "index": (f"sharded/{INDEX}", lambda root: open_checkpoint(root / "sharded")),
    "shard": ("sharded/a.safetensors", lambda root: open_checkpoint(root / "sharded")),
    "tokenizer": ("model/tokenizer.json", lambda root: open_tokenizer(root / "model")),
    "settings": ("model/tokenizer_config.json", lambda root: _templated(root / "model")),
    "template": ("model/chat_template.jinja", lambda root: _templated(root / "model")),
    "manifest": ("tree/manifest.json", lambda root: read_manifest(root / "tree")),
    "tensor": ("tree/layer-0/attn_norm.bin", lambda root: read_aprt(root / "tree/layer-0/attn_norm.bin")),
    "loaded": ("tree/layer-0/attn_norm.bin", lambda root: repr(load_tree(root / "tree")["layer-0"])),
    "compared": ("tree/layer-0/attn_norm.bin", lambda root: compare(root / "reference", root / "tree")),
    "safetensors": ("s/layer-0/lm_head.safetensors", lambda root: open_tensor(root / "s/layer-0/lm_head.safetensors")),
    "gguf": ("m/x.gguf", lambda root: GgufFile(root / "m" / "x.gguf")),
}
MAKE: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.touch(),
}


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    for name, source in {"model": world.dense, "sharded": world.sharded, "tree": world.trees["aprt"]}.items():
        shutil.copytree(source, tmp_path / name)
    shutil.copytree(world.trees["aprt"], tmp_path / "reference")
    for name in ("s/layer-0", "m"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_plain_file_is_refused(root: Path, place: str, made: str) -> None:
    """A pipe would be waited for without end, and so would a device be read."""
    name, read = PLACES[place]
    path = root / name
    path.unlink(missing_ok=True)
    MAKE[made](path)
    if (place, made) == ("template", "empty") or made in OPTIONAL.get(place, ()):
        read(root)
        return
    with time_limit(), pytest.raises(UserError) as error:
        read(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_links_of_a_cache_are_followed(root: Path, sharded: bool) -> None:
    """A snapshot is a folder of links to `../../blobs`: names stay in the folder, what they lead to need not."""
    source, hub = root / ("sharded" if sharded else "model"), root / "hub" / "models--acme--tiny"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        file.rename(hub / "blobs" / str(number))
        (hub / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(hub / "snapshots" / "abc")
    assert checkpoint.name == "acme/tiny"
    assert checkpoint.tokenizer() is not None
    assert all(np.isfinite(checkpoint.tensor(name).astype(np.float32)).all() for name in checkpoint.tensor_names)


@pytest.mark.parametrize("name", ["../a.safetensors", "/x.safetensors", "..", "b/a.safetensors", "a\0.safetensors"])
def test_an_index_names_files_of_its_folder(root: Path, name: str) -> None:
    save_file({"model.norm.weight": np.zeros(8, np.float32)}, root / "a.safetensors")
    index = root / "sharded" / INDEX
    stated = json.loads(index.read_text())
    stated["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"not a file of its own folder|null byte"):
        open_checkpoint(root / "sharded")


def test_a_tokenizer_is_read_from_its_folder_alone(root: Path) -> None:
    """Settings that name other files: not followed where the vocabulary is, refused where it is to be found."""
    folder, outside = root / "model", root / "tokenizer.9.9.9.json"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    outside.write_text(json.dumps(tokenizer).replace("endoftext", "outside"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"fast_tokenizer_files": [f"../{outside.name}"], "tokenizer_file": str(outside), "vocab_file": str(outside)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    found = open_tokenizer(folder)
    assert found is not None and "outside" not in found.templated().backend_tokenizer.to_str()
    assert found.chat("Hi").startswith("<|im_start|>user")
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "merges.txt").write_text("")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="names other files"):
        open_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    assert open_tokenizer(folder) is not None


@pytest.mark.parametrize(
    "path", ["../x.bin", "/x.bin", "layer-0/../../x.bin", "a\0.bin", "x" * 300, "", 7, "layer-0//x"]
)
def test_a_manifest_names_files_of_its_folder(root: Path, path: object) -> None:
    manifest = root / "tree" / "manifest.json"
    stated = json.loads(manifest.read_text())
    stated["files"][0]["path"] = path
    manifest.write_text(json.dumps(stated))
    with pytest.raises(UserError, match="path below the folder"):
        read_manifest(root / "tree")


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


def test_a_scalar_is_one_value(root: Path) -> None:
    path = root / "s" / "layer-0" / "lm_head.safetensors"
    save_file({"x": np.float32(3)[...]}, path)
    assert open_tensor(path)[1].values.tolist() == [3.0]


def test_a_limit_that_is_no_number_is_refused(root: Path) -> None:
    """No error is greater than NaN: with such a limit every engine would pass."""
    for options in (Options(max_ratio=float("nan")), Options(min_cosine=float("nan"))):
        with pytest.raises(UserError, match="not nan"):
            compare(root / "reference", root / "tree", root / "reference", options)


def test_names_that_are_no_text_are_printed(root: Path) -> None:
    """Bytes of a file's name need be no UTF-8, and a folder may be called like a style of `rich`."""
    shutil.copy(root / "tree/layer-0/attn_norm.bin", os.fsencode(root / "tree/layer-0") + b"/x\xff\x1b[31m.bin")
    model = (root / "model").rename(root / "[red]\udcff")
    for words in (["oracle", "compare", root / "reference", root / "tree"], ["weights", "inspect", model]):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"\x1b" not in done.stdout + done.stderr
    assert b"[red]" in done.stdout
