"""One function a reader: it reads the input as a user's command would, and holds what it got to what it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from safetensors import safe_open

from jaxref.aprt import HEADER, aprt_header, read_aprt
from jaxref.npz import open_npz
from jaxref.safetensors_stages import open_all
from oracle.tensor_file import open_tensor
from tests.fuzz.grammars import GRAMMARS
from tests.fuzz.mutate import Mutation, mutate_bytes, mutate_gguf, mutate_json, mutate_safetensors, mutate_words
from tests.fuzz.tree_targets import NAMED, PATHS, manifest, names, unfinished
from tests.fuzz.world import INDEX, World
from weights import Checkpoint, Config, UserError, open_checkpoint, open_tokenizer, read_config
from weights.inspect import describe
from weights.safetensors_file import SafetensorsFile


@dataclass(frozen=True)
class Target:
    """A reader: `check` raises `UserError` for what it refuses, and anything else where something is wrong."""

    name: str
    check: Callable[[World, bytes], object]
    seeds: Callable[[World], list[bytes]]
    mutate: Mutation


def aprt(world: World, data: bytes) -> None:
    path = world.file("aprt/layer-3/attn_norm.bin", data)
    layer, values = read_aprt(path)
    assert values.nbytes + HEADER.size == len(data)
    assert layer is None or 0 <= layer < 0xFFFFFFFF
    assert aprt_header(layer, values.shape) == data[: HEADER.size]
    assert open_tensor(path)[0] == layer
    np.isfinite(values).sum()


def safetensors(world: World, data: bytes) -> None:
    path = world.file("safetensors/layer-3/attn_norm.safetensors", data)
    try:
        found = open_all(path)
    except UserError:
        found = None
    file = _whole(path, taken=found is not None)
    with safe_open(path, framework="np") as peer:
        assert sorted(peer.keys()) == sorted(file.entries)
        for name in file.entries:
            assert tuple(peer.get_slice(name).get_shape()) == tuple(file.entries[name]["shape"])
    for name in file.entries:
        values = file.tensor(name)
        assert values.nbytes <= len(data)
        values.view(np.uint8).sum()
    if found is not None:
        assert found.keys() == file.entries.keys()
        for name, values in found.items():
            assert np.asarray(values).dtype == file.tensor(name).dtype, name
            assert np.asarray(values).tobytes() == file.tensor(name).tobytes(), name
    if found is None or len(found) == 1:
        layer, one = open_tensor(path)  # and is refused, where it is none
        assert found is not None and layer == 3
        assert one.values.shape == (one.values.size,) == (next(iter(found.values())).size,)


def npy(world: World, data: bytes) -> None:
    path = world.file("npy/layer-3/attn_norm.npy", data)
    layer, one = open_tensor(path)
    theirs = np.load(path, allow_pickle=False)
    assert layer == 3 and one.values[:].dtype == theirs.dtype
    assert one.values[:].tobytes() == theirs.tobytes() and theirs.nbytes < len(data)


def npz(world: World, data: bytes) -> None:
    found = open_npz(path := world.file("npz/trace.npz", data))
    with np.load(path, allow_pickle=False) as theirs:
        assert found.keys() == {name for name in theirs.files if not name.endswith("/")}
        for name, values in found.items():
            assert values.size * values.dtype.itemsize < len(data)
            try:
                one = np.atleast_1d(theirs[name])
            except BadZipFile:  # of its checksum, which is theirs alone to look at
                continue
            assert (values.dtype, values.shape) == (one.dtype, one.shape), name
            assert np.asarray(values).tobytes() == one.tobytes(), name


def _zipped(*contents: dict[str, np.ndarray]) -> list[bytes]:
    files = [BytesIO() for _ in contents]
    for file, arrays in zip(files, contents, strict=True):
        np.savez(file, **arrays)
    return [file.getvalue() for file in files]


def _saved(*arrays: np.ndarray) -> list[bytes]:
    files = [BytesIO() for _ in arrays]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    return [file.getvalue() for file in files]


def _whole(path: Path, *, taken: bool) -> SafetensorsFile:
    """What the package takes for a whole file; what a tree takes must be one."""
    try:
        return SafetensorsFile(path)
    except UserError as error:
        assert not taken, f"{path}: {error}"
        raise


def index(world: World, data: bytes) -> None:
    folder = world.copy(world.sharded, "index")
    (folder / INDEX).write_bytes(data)
    checkpoint = open_checkpoint(folder)
    assert all(file.path.parent == folder for file in checkpoint.files.values())
    _use(checkpoint, len(data))


def config(world: World, data: bytes) -> None:
    folder = world.copy(world.moe, "config-moe") if b"qwen3_moe" in data else world.copy(world.dense, "config")
    (folder / "config.json").write_bytes(data)
    found = read_config(folder / "config.json")
    assert Config.from_json(found.to_json()) == found
    assert len(found.layer_types) == found.num_hidden_layers
    _use(open_checkpoint(folder), len(data))


def gguf(world: World, data: bytes) -> None:
    path = world.file("gguf/model.gguf", data)
    checkpoint = open_checkpoint(path)
    _use(checkpoint, len(data))
    _tokenize(checkpoint.tokenizer())


def _use(checkpoint: Checkpoint, size: int) -> None:
    """What `inspect` prints, and every tensor."""
    json.dumps(describe(checkpoint), allow_nan=False)
    for name in checkpoint.tensor_names:
        assert checkpoint.tensor(name).shape == checkpoint.shape(name)


def _tokenize(tokenizer: object) -> None:
    if tokenizer is not None:
        ids = tokenizer.encode("Hi 2+2 <|im_end|>")  # type: ignore[attr-defined]
        assert all(0 <= i < 1 << 32 for i in ids)
        tokenizer.decode([*ids, 0, 1 << 20])  # type: ignore[attr-defined]


def tokenizer(world: World, data: bytes) -> None:
    folder = world.copy(world.dense, "tokenizer")
    (folder / "tokenizer.json").write_bytes(data)
    _tokenize(open_tokenizer(folder))


def template(world: World, data: bytes) -> None:
    folder = world.copy(world.dense, "template")
    (folder / "tokenizer_config.json").write_bytes(data)
    found = open_tokenizer(folder)
    assert found is not None
    found.encode(found.chat("Hi"))


def _files(*names: str) -> Callable[[World], list[bytes]]:
    """Seeds: these attributes of the world, each a folder and a file in it."""
    pairs = [name.split("/", 1) for name in names]
    return lambda world: [(getattr(world, folder) / file).read_bytes() for folder, file in pairs]


def _tree(form: str, *paths: str) -> Callable[[World], list[bytes]]:
    return lambda world: [(world.trees[form] / path).read_bytes() for path in paths]


_TARGETS = (
    Target("aprt", aprt, _tree("aprt", "layer-0/attn_norm.bin", "lm_head.bin"), mutate_bytes),
    Target(
        "safetensors",
        safetensors,
        lambda world: (
            _tree("safetensors", "layer-0/attn_norm.safetensors", "layer-0/moe_router_indices.safetensors")(world)
            + _files("sharded/a.safetensors")(world)
        ),
        mutate_safetensors,
    ),
    Target(
        "npy",
        npy,
        lambda world: _saved(np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4), np.float16([1, np.nan])),
        mutate_bytes,
    ),
    Target(
        "npz",
        npz,
        lambda world: _zipped(
            {"layer-0/attn_norm": np.arange(6, dtype=np.float32).reshape(2, 3), "lm_head": np.arange(4)},
            {"größe": np.float16([1, np.nan])},
        ),
        mutate_bytes,
    ),
    Target("index", index, _files(f"sharded/{INDEX}"), mutate_json),
    Target("config", config, _files("dense/config.json", "moe/config.json"), mutate_json),
    Target("gguf", gguf, lambda world: world.ggufs, mutate_gguf),
    Target("tokenizer", tokenizer, _files("dense/tokenizer.json"), mutate_json),
    Target("template", template, _files("dense/tokenizer_config.json"), mutate_json),
    Target("manifest", manifest, _tree("aprt", "manifest.json"), mutate_json),
    Target("unfinished", unfinished, _tree("aprt", "manifest.json"), mutate_json),
    Target(
        "tree",
        names,
        lambda world: ["\n".join(NAMED).encode("utf-8", "surrogatepass")],
        mutate_words([*PATHS, "\n", "layer-", ".bin"]),
    ),
    *(
        Target(name, grammar.check, lambda world, texts=grammar.seeds: [t.encode() for t in texts], grammar.mutate)
        for name, grammar in GRAMMARS.items()
    ),
)
TARGETS = {target.name: target for target in _TARGETS}
