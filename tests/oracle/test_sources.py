"""A tree may be a folder of APRT, .npy or safetensors files, one file of all, or arrays in memory."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import jaxref
from oracle import assert_parity, compare
from oracle.explain import explain
from oracle.report import as_text
from oracle.tensor_file import open_tensor
from oracle.told import sentence
from oracle.trees import Tree
from tests.commands import command, refused
from tests.conftest import prompt
from tests.trees import flat, write_tree
from weights import UserError, open_checkpoint

TOKENS = prompt(9, 272)


@pytest.fixture(scope="module")
def engine(zoo) -> dict[str, np.ndarray]:
    """What an engine computed whose layer 2 has query heads read the wrong kv heads."""
    model = open_checkpoint(zoo("qwen2"))
    found = flat(jaxref.forward(model.params(), TOKENS, model.config))
    return {name: (x[::-1].copy() if name == "layer-2/attn_scores" else x.copy()) for name, x in found.items()}


@pytest.fixture(scope="module")
def root(zoo, engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_tree(zoo("qwen2"), folder / "truth", TOKENS, dtype="float64", positions="all")
    for name, x in engine.items():
        for form in ("npy", "st"):
            (folder / form / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "npy" / f"{name}.npy", x)
        save_file({"x": x}, folder / "st" / f"{name}.safetensors")
    save_file(engine, folder / "one.safetensors")
    np.savez(folder / "one.npz", **engine)
    save_torch({name: torch.from_numpy(x) for name, x in engine.items()}, folder / "torch.safetensors")
    return folder


def given(root: Path, engine: dict, form: str) -> object:
    by_layer: dict = {}
    for name, x in engine.items():
        layer, _, stage = name.rpartition("/")
        (by_layer.setdefault(layer, {}) if layer else by_layer)[stage] = torch.from_numpy(x)
    return {"arrays": engine, "by layer": by_layer}.get(form, root / form)


FORMS = ["npy", "one.safetensors", "one.npz", "torch.safetensors", "arrays", "by layer"]


@pytest.mark.parametrize("form", FORMS)
def test_all_are_compared_alike(root: Path, engine, form: str) -> None:
    told = given(root, engine, form)
    result, plain = compare(root / "truth", told), compare(root / "truth", root / "st")
    assert result.first is not None and result.first.key == (2, "attn_scores"), as_text(result)
    assert len(result.comparisons) == len(engine) and not result.skips
    for ours, theirs in zip(result.comparisons, plain.comparisons, strict=True):
        assert (ours.key, ours.status, ours.test) == (theirs.key, theirs.status, theirs.test)
    with pytest.raises(AssertionError, match="layer-2/attn_scores"):
        assert_parity(root / "truth", told)
    right = {name: np.asarray(x) for name, x in engine.items() if not name.startswith("layer-2")}
    assert_parity(root / "truth", right, allow_missing=["layer-2/.*"])


@pytest.mark.parametrize("form", FORMS)
def test_and_replayed_alike(zoo, root: Path, engine, form: str) -> None:
    told = explain(open_checkpoint(zoo("qwen2")), given(root, engine, form), TOKENS)
    (fault,) = told.found.faults
    assert (fault.stage, fault.layers) == ("attn_scores", (2,)), sentence(told)
    plain = explain(open_checkpoint(zoo("qwen2")), root / "st", TOKENS)
    assert [(row.key, row.local, row.floor) for row in told.found.locals] == [
        (row.key, row.local, row.floor) for row in plain.found.locals
    ]


def test_the_commands_take_them(zoo, root: Path, engine) -> None:
    done = command("compare", root / "truth", root / "one.safetensors", module="oracle")
    assert done.returncode == 1 and f"{len(engine)} stages compared, 1 diverge" in done.stdout, done
    done = command("diff", root / "npy/layer-1/ffn_up.npy", root / "truth/layer-1/ffn_up.bin", module="oracle")
    assert done.returncode in (0, 1) and "layer        1" in done.stdout, done
    page = root / "page.html"
    done = command("explain", zoo("qwen2"), root / "one.safetensors", "--html", page, module="oracle")
    assert done.returncode == 1 and "faulty: one.safetensors" in done.stdout, done
    assert "attn_scores" in page.read_text("utf-8")


def test_load_tree_reads_numpys_files(root: Path, engine) -> None:
    tree = jaxref.load_tree(root / "npy")
    np.testing.assert_array_equal(tree["layer-1"]["attn_scores"], engine["layer-1/attn_scores"])
    np.testing.assert_array_equal(tree["lm_head"], engine["lm_head"])


def test_half_precision_is_seen(root: Path, engine) -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        halves = {name: x.astype(dtype) for name, x in engine.items()}
        assert Tree(halves, "test").guess_dtype() == np.dtype(dtype).name
        save_file(halves, root / "halves.safetensors")
        assert Tree(root / "halves.safetensors", "test").guess_dtype() == np.dtype(dtype).name


def test_tensors_of_torch_are_taken_as_they_are(root: Path, engine) -> None:
    """In bfloat16, with a gradient, or not contiguous."""
    tensors = {name: torch.from_numpy(x) for name, x in engine.items()}
    tensors = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in tensors.items()}
    save_torch(tensors, root / "bfloat16.safetensors")
    given = {name: x.mT.contiguous().mT.requires_grad_(x.is_floating_point()) for name, x in tensors.items()}
    ours, theirs = (compare(root / "truth", told) for told in (given, root / "bfloat16.safetensors"))
    assert Tree(given, "test").guess_dtype() == "bfloat16" and len(ours.comparisons) == len(engine)
    assert [row.test for row in ours.comparisons] == [row.test for row in theirs.comparisons]


def test_what_is_no_stage_may_be_anything(root: Path, engine, tmp_path: Path) -> None:
    """A mask, an empty cache, a name: nobody reads them, and they are told."""
    others = {"mask": torch.ones(3, 3, dtype=torch.bool), "layer-0/cache": torch.zeros(0, 4)}
    tensors = {name: torch.from_numpy(x) for name, x in engine.items()}
    save_torch(tensors | others, tmp_path / "one.safetensors")
    for told in (tmp_path / "one.safetensors", {**tensors, **others, "prompt": "What is 2+2?"}):
        tree = Tree(told, "test")
        assert len(tree.files) == len(engine) and {"mask", "layer-0/cache"} <= set(tree.unknown)
    save_torch({"lm_head": others["mask"]}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"'lm_head' is stored as 'BOOL'; supported are F64"):
        Tree(tmp_path / "one.safetensors", "test")


def test_a_file_that_is_written_meanwhile_is_refused(root: Path, engine, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file(engine, path)
    tree = Tree(path, "test")
    first = next(iter(tree.files))
    tree.open(first).values[:]
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="changed while it was in use"):
        tree.open(first).values[:]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "test arrays: holds no stage's tensor (called like layer-0/attn_norm)"),
        ({"layer-0/attn_norm": "text"}, "test arrays/layer-0/attn_norm: [] <U4; floats or integers were expected"),
        ({"layer-0/attn_norm": np.zeros((0, 3))}, "[0, 3] float64; floats or integers"),
        ({"layer-0/attn_norm": [[1], [2, 3]]}, "layer-0/attn_norm: NumPy makes no array of it"),
        ({"lm_head": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "lm_head: NumPy makes no array of it"),
        ({"lm_head": torch.zeros(3, device="meta")}, "lm_head: NumPy makes no array of it"),
        ({"lm_head": torch.zeros(3, dtype=torch.bool)}, "lm_head: [3] bool; floats or integers"),
        ({"layer-1/ffn_out": np.zeros(3), "layer-1/FFN_OUT": np.zeros(3)}, "are the same stage of layer 1"),
        ({"blocks.3.attn_norm": np.zeros(3)}, "seems to be layer-3/attn_norm, and has to be called so"),
        ({"layer-0/layer-1/attn_norm": np.zeros(3)}, "holds no stage's tensor"),
        ({"x": np.zeros(3)}, "so there is nothing to compare; it has 'x'"),
        ({"model.layers.0.mlp.up_proj.weight": np.zeros(3)}, "it looks like a model"),
    ],
)
def test_what_is_no_tree_is_one_line(root: Path, arrays: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        compare(root / "truth", arrays)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_one_line(zoo, root: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.pt").write_bytes(b"PK\x03\x04")
    assert "one .safetensors or .npz file with names like" in refused(
        "compare", root / "truth", tmp_path / "trace.pt", module="oracle"
    )
    assert "it looks like a model" in refused(
        "compare", root / "truth", zoo("qwen2") / "model.safetensors", module="oracle"
    )
    (tmp_path / "half.safetensors").write_bytes((root / "one.safetensors").read_bytes()[:-4])
    assert "not a whole safetensors file" in refused(
        "explain", zoo("qwen2"), tmp_path / "half.safetensors", module="oracle"
    )


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), order="F"), "column by column"),
        (np.zeros(3, ">f4"), "no little-endian floats"),
        (np.zeros(3, ml_dtypes.bfloat16), "save it as float32"),
        (np.zeros(3, bool), "save it as float32"),
        (np.zeros((0, 3)), "no values"),
        (np.array([{}], object), "save it as float32"),
    ],
)
def test_an_array_that_is_no_tensor(tmp_path: Path, array: np.ndarray, words: str) -> None:
    path = tmp_path / "layer-1" / "ffn_up.npy"
    path.parent.mkdir()
    np.save(path, array, allow_pickle=True)
    with pytest.raises(UserError, match=words):
        open_tensor(path)
