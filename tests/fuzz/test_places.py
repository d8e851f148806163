"""Files that are none, links, and names that lead out of a folder or that no text holds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxref.aprt import read_aprt
from jaxref.loaded import load_tree
from jaxref.npz import open_npz
from jaxref.selection import parse_layers, parse_positions
from jaxref.tree import read_manifest
from oracle.comparer import compare
from oracle.engine_tree import EngineTree
from oracle.rules import Options
from oracle.tensor_file import open_tensor
from oracle.tolerances import compile_missing
from tests.fuzz.attempt import SECONDS, time_limit
from tests.fuzz.world import INDEX, World
from weights import UserError, open_checkpoint, open_tokenizer, read_config
from weights.gguf_file import GgufFile

# A folder may lack these, and a link that leads nowhere is nothing.
NOWHERE = ("loop", "link to nothing")
OPTIONAL = {"tokenizer": NOWHERE, "settings": NOWHERE, "template": NOWHERE, "manifest": ("link to nothing",)}
ROOT = Path(__file__).parents[2]


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
    "npz": ("s/trace.npz", lambda root: open_npz(root / "s/trace.npz")),
    "gguf": ("m/x.gguf", lambda root: GgufFile(root / "m" / "x.gguf")),
}


@contextlib.contextmanager
def ended(path: Path) -> Iterator[None]:
    """A pipe that somebody waits for gets its end after some seconds, and that is a failure.

    By a process of its own: a library in Rust holds the interpreter's lock while it waits.
    """
    words = ["sh", "-c", f'sleep {SECONDS}; test -p "$0" && : > "$0"', path]
    with subprocess.Popen(words, start_new_session=True) as late:
        try:
            with time_limit():
                yield
            assert late.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(late.pid, signal.SIGKILL)


MAKE: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.touch(),
}


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
    with ended(path), pytest.raises(UserError) as error:
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
    with pytest.raises(UserError, match=r"not a file of its own folder|embedded null"):
        open_checkpoint(root / "sharded")


@pytest.mark.parametrize("tokens", [7, "1,2", [True], [-1], [1 << 32], [None]])
def test_a_manifest_holds_token_ids(root: Path, tokens: object) -> None:
    manifest = root / "tree" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tokens": tokens}))
    with pytest.raises(UserError, match="its tokens are no list of ids"):
        read_manifest(root / "tree")


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


def test_a_scalar_is_one_value(root: Path) -> None:
    path = root / "s" / "layer-0" / "lm_head.safetensors"
    save_file({"x": np.float32(3)[...]}, path)
    assert open_tensor(path)[1].values[:].tolist() == [3.0]


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
    words = [sys.executable, "-m", "oracle", "compare", "\x1b[31m", "x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr.split(b":")[:2]) == (2, [b"error", b" \\x1b[31m"])


def test_two_names_of_one_stage_are_told_in_one_line(root: Path) -> None:
    file = root / "tree" / "layer-0" / "attn_norm.bin"
    shutil.copy(file, file.with_name("attn_norm\n.bin"))
    for read in (load_tree, lambda tree: compare(root / "reference", tree)):
        with pytest.raises(UserError, match=r"'attn_norm\\n.bin' .*are the same stage") as error:
            read(root / "tree")
        assert "\n" not in str(error.value)


def test_each_pattern_is_one_by_itself() -> None:
    with pytest.raises(UserError, match="no regular expression"):
        compile_missing(["a)|(b"])


def test_what_a_tokenizer_does_not_take_is_said(root: Path) -> None:
    tokenizer = open_tokenizer(root / "model")
    assert tokenizer is not None
    for call in (lambda: tokenizer.encode("\ud800"), lambda: tokenizer.decode([1 << 40])):
        with pytest.raises(UserError, match="the tokenizer does not take this"):
            call()


def test_numbers_are_written_in_plain_digits() -> None:
    """`int` would take 1_0 for 10 and the digits of every script: a slip of the finger would be another layer."""
    for text in ("1_0", "٣", "+1", "1e0"):
        for parse in (parse_layers, parse_positions):
            with pytest.raises(UserError, match="a comma list like"):
                parse(text, 100)


def test_tokens_of_another_vocabulary_are_refused(root: Path, world: World) -> None:
    manifest = root / "tree" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tokens": [1, 272, 3]}))
    with pytest.raises(UserError, match=r"token ids \[272\] are outside the model's vocabulary, 0 to 271"):
        EngineTree(root / "tree", world.moe_checkpoint)
