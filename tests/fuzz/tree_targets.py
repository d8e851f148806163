"""Trees: a manifest that was tampered with, and folders with names that no producer gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

from jaxref.loaded import load_tree
from jaxref.tree import MANIFEST, UNFINISHED, Tree
from oracle.comparer import compare
from oracle.engine_tree import EngineTree
from oracle.records import records
from oracle.report import as_text
from tests.fuzz.mutate import text_of
from tests.fuzz.world import World
from weights import UserError

# Names of files: of stages, of aliases, and such as look like one.
PATHS = (
    "layer-0/attn_norm.bin", "layer-0/embedding.bin", "layer-00/attn_norm.bin", "layer-0/ATTN_NORM.bin",
    "layer-٠/attn_norm.bin", "layer-1/attn_norm.bin", "layer-9/ffn_silu.bin", "layer-0/layer_output.bin", "lm_head.bin",
    "layer-0/post_ffn_residual.bin", "layer-0/attn_norm.safetensors", "embedding.bin", "layer--1/attn_norm.bin",
    "layer-4294967296/attn_norm.bin", "layer-99999999999/attn_norm.bin", "layer-0/x\udcff.bin", "layer-0/\x1b[31m.bin",
    "layer-0/.attn_norm.bin", "layer-0/moe_router_indices.bin", "layer-0/attn_norm.bin/x", "layer-0/a\nb.bin",
    "layer-0.bin", "manifest.json", ".unfinished.json", "layer-0/[red].bin", "layer-0/attn_scores.bin",
    "layer-1/attn_norm.npy",
)  # fmt: skip
NAMED = ("layer-0/attn_norm.bin", "layer-0/x\udcff.bin", "layer-0/[red].bin")


def manifest(world: World, data: bytes) -> None:
    """A tree whose manifest is the input, read by all that read manifests; a refusal by one does not spare the next."""
    folder = world.copy(world.trees["aprt"], "manifest")
    (folder / MANIFEST).write_bytes(data)
    refused: list[UserError] = []
    readers = (
        lambda: _load(folder),
        lambda: _compare(world.trees["safetensors"], folder),
        lambda: _compare(folder, world.trees["aprt"]),
        lambda: _replayed(world, folder),
    )
    for reader in readers:
        try:
            reader()
        except UserError as error:
            refused.append(error)
    if len(refused) == len(readers):
        raise refused[0]


def unfinished(world: World, data: bytes) -> None:
    """The notes of a dump that was cut off: the next dump clears what they name, and nothing outside its folder."""
    root = world.root / "unfinished"
    shutil.rmtree(root, ignore_errors=True)
    outside = [root / ".x.bin.tmp", root / "layer-0" / ".attn_norm.bin.tmp", root / "tree.link" / ".lm_head.bin.tmp"]
    for path in outside:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = root / "tree"
    (folder / "layer-0").mkdir(parents=True)
    (folder / UNFINISHED).write_bytes(data)
    run = json.loads((world.trees["aprt"] / MANIFEST).read_bytes())
    paths = [entry["path"] for entry in run.pop("files")]
    with Tree(folder, run, paths, 0) as tree:
        tree.finish(paths)
    assert all(path.exists() for path in outside)
    load = json.loads((folder / MANIFEST).read_bytes())
    assert load["files"] == []


def _load(folder: Path) -> None:
    tree = load_tree(folder)
    str(repr(tree)).encode("utf-8", "surrogateescape")
    for name in tree:
        repr(tree[name])


def _compare(reference: Path, test: Path) -> None:
    result = compare(reference, test)
    for record in records(result):
        json.dumps(record, allow_nan=False)
    as_text(result)
    result._repr_html_()


def _replayed(world: World, folder: Path) -> None:
    engine = EngineTree(folder, world.moe_checkpoint)
    for key in engine.keys:
        engine.value(key)
    engine.numerics(None)


def names(world: World, data: bytes) -> None:
    """A tree of files called as the lines of the input say, each a valid APRT file of its layer."""
    folder = world.root / "names"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes((world.trees["aprt"] / MANIFEST).read_bytes())
    source = (world.trees["aprt"] / "layer-0" / "attn_norm.bin").read_bytes()
    for line in text_of(data).split("\n")[:12]:
        _put(folder, line, source)
    _load(folder)
    _compare(world.trees["aprt"], folder)


def _put(folder: Path, line: str, data: bytes) -> None:
    parts = PurePosixPath(line).parts
    if not parts or line.startswith("/") or ".." in parts:
        return  # the target's own writing stays in its folder
    path = folder.joinpath(*parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except (OSError, ValueError):
        pass  # no name of a file here
