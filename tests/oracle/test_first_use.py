"""What somebody meets who dumps a tree for the first time: each mistake ends in one line that says what is right."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import jaxref
from oracle import compare
from oracle.engine_tree import EngineTree
from oracle.tensor_file import open_tensor
from tests.oracle.test_cli import oracle
from tests.oracle.test_other_files import refusing
from tests.test_engines_page import example
from tests.trees import write_tree
from weights import UserError, open_checkpoint

TOKENS = [54, 71, 64, 83, 22]


@pytest.fixture(scope="module")
def trees(zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a manifest and a bare one of each model: qwen2, qwen2-bare, qwen3, …"""
    root = tmp_path_factory.mktemp("first")
    for name in ("qwen2", "qwen3", "moe"):
        write_tree(zoo(name), root / name, TOKENS, positions="all")
        shutil.copytree(root / name, root / f"{name}-bare")
        (root / f"{name}-bare" / "manifest.json").unlink()
    return root


def renamed(trees: Path, to: Path, form: str, *, first: int = 1) -> Path:
    """The bare qwen2 tree with its four layers called otherwise, headers too."""
    shutil.copytree(trees / "qwen2-bare", to)
    for layer in (3, 2, 1, 0):
        folder = (to / f"layer-{layer}").rename(to / form.format(layer + first))
        for path in folder.iterdir():
            data = path.read_bytes()
            path.write_bytes(data[:4] + struct.pack("<I", layer + first) + data[8:])
    return to


def refusals(zoo, trees: Path, tree: Path, model: str = "qwen2") -> list[str]:
    """What compare and localize say of a bare tree that they refuse."""
    found = []
    for read in (partial(compare, trees / model), lambda path: EngineTree(path, open_checkpoint(zoo(model)), TOKENS)):
        with pytest.raises(UserError) as error:
            read(tree)
        found.append(str(error.value))
    assert not any("\n" in line for line in found)
    return found


def test_layers_counted_from_1(zoo, trees, tmp_path) -> None:
    for tree in (renamed(trees, tmp_path / "whole", "layer-{}"), renamed(trees, tmp_path / "short", "layer-{}")):
        if tree.name == "short":
            shutil.rmtree(tree / "layer-4")
        assert all("seem to be counted from 1" in line for line in refusals(zoo, trees, tree))


def test_layers_without_the_first_are_no_mistake(zoo, trees, tmp_path) -> None:
    shutil.copytree(trees / "qwen2-bare", tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree" / "layer-0")
    assert EngineTree(tmp_path / "tree", open_checkpoint(zoo("qwen2")), TOKENS).keys
    assert compare(trees / "qwen2", tmp_path / "tree").verdict == "incomplete"


@pytest.mark.parametrize("form", ["layer_{}", "blk.{}", "layers.{}", "{}"])
def test_other_names_of_layers(zoo, trees, tmp_path, form: str) -> None:
    tree = renamed(trees, tmp_path / "tree", form, first=0)
    for line in refusals(zoo, trees, tree):
        assert form.format(0) in line and "layers are the folders layer-0, layer-1" in line


def test_one_folder_of_another_name_is_noted(zoo, trees, tmp_path) -> None:
    shutil.copytree(trees / "qwen2-bare", tmp_path / "tree")
    (tmp_path / "tree" / "layer-3").rename(tmp_path / "tree" / "layer_3")
    notes = EngineTree(tmp_path / "tree", open_checkpoint(zoo("qwen2")), TOKENS).notes
    assert any(note.endswith("no stages, so not replayed: layer_3") for note in notes), notes


@pytest.mark.parametrize(
    ("model", "tree", "words"),
    [
        ("qwen2", "qwen3", "looks like qwen3 (it holds q_norm, k_norm), MODEL is qwen2"),
        ("qwen3", "qwen2", "looks like qwen2 (it holds qkv_bias), MODEL is qwen3"),
        ("qwen2", "moe", "looks like qwen3_moe (it holds moe_"),
        ("moe", "qwen3", "looks like qwen3 (it holds ffn_"),
    ],
)
def test_the_tree_of_another_model(zoo, trees, model: str, tree: str, words: str) -> None:
    checkpoint = open_checkpoint(zoo(model))
    notes = EngineTree(trees / f"{tree}-bare", checkpoint, TOKENS).notes
    assert len([note for note in notes if words in note]) == 1, notes
    assert any(words in note for note in compare(trees / model, trees / f"{tree}-bare").notes)
    assert not any("looks like" in n for n in EngineTree(trees / f"{model}-bare", checkpoint, TOKENS).notes)
    with pytest.raises(UserError, match=r"the engine tree is of another model: model_type"):
        EngineTree(trees / tree, checkpoint)


def test_more_layers_than_the_model(zoo, trees, tmp_path) -> None:
    shutil.copytree(trees / "qwen2-bare", tmp_path / "tree")
    shutil.copytree(tmp_path / "tree" / "layer-3", tmp_path / "tree" / "layer-7")
    for line in refusals(zoo, trees, tmp_path / "tree"):
        assert "holds layer-7/" in line and "the model has 4 layers" in line
    for layer in (2, 3, 7):
        shutil.rmtree(tmp_path / "tree" / f"layer-{layer}")
    notes = EngineTree(tmp_path / "tree", open_checkpoint(zoo("qwen2")), TOKENS).notes
    assert any("ends at layer-1, the model has 4 layers" in note for note in notes)


@pytest.mark.parametrize(
    ("tree", "positions", "words"),
    [
        ("qwen2", (1, 2), "its manifest says positions 0,1,2,3,4, 1,2 were given"),
        ("qwen2-bare", (1, 2), "holds 5 rows, --positions names 2"),
        ("qwen2-bare", (1, 9), "--positions 9: the prompt has 5 tokens, positions 0 to 4"),
    ],
)
def test_positions_that_are_not_the_trees(zoo, trees, tree: str, positions: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        EngineTree(trees / tree, open_checkpoint(zoo("qwen2")), TOKENS, positions)
    code, message = oracle("compare", trees / "qwen2", trees / tree, "--positions", ",".join(map(str, positions)))
    assert code == 2 and words in message


def test_positions_without_tokens(zoo, trees) -> None:
    with pytest.raises(UserError, match="give --tokens too"):
        EngineTree(trees / "qwen2-bare", open_checkpoint(zoo("qwen2")), positions=(5, 6, 7, 8, 9))


@pytest.mark.parametrize("text", ["[1, 2]", "{}", '{"name": "app"}', "hello"])
def test_the_manifest_of_another_program(trees, tmp_path, text: str) -> None:
    shutil.copytree(trees / "qwen2-bare", tmp_path / "tree")
    (tmp_path / "tree" / "manifest.json").write_text(text)
    for read in (jaxref.load_tree, partial(compare, trees / "qwen2")):
        with pytest.raises(UserError, match=r"manifest\.json: not .*move manifest\.json away"):
            read(tmp_path / "tree")


@pytest.mark.parametrize("place", ["layer-1", ""])
def test_load_tree_of_a_folder_that_cannot_be_read(trees, monkeypatch, place: str) -> None:
    closed = trees / "qwen2" / place
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, partial(refusing, closed, getattr(os, name)))
    with pytest.raises(UserError, match=f"{re.escape(str(closed))}: cannot be read: Permission denied"):
        jaxref.load_tree(trees / "qwen2")


def test_load_tree_of_a_file(trees) -> None:
    with pytest.raises(UserError, match="is a file, and a tree is a folder"):
        jaxref.load_tree(trees / "qwen2" / "lm_head.bin")
    with pytest.raises(UserError, match="File name too long"):
        jaxref.load_tree("a" * 999)


def test_a_dump_prints_odd_names_as_they_are_spelled(zoo, tmp_path) -> None:
    odd = tmp_path / "[b]\x1b[31mx"
    for more in ([], ["--plan"]):
        arguments = ["dump", zoo("qwen2"), "--tokens", "1,2", "--stages", "embedding", "--output", odd, *more]
        done = subprocess.run([sys.executable, "-m", "jaxref", *arguments], capture_output=True, text=True, check=True)
        shown = done.stdout
        assert "\x1b" not in shown and r"[b]\x1b[31mx" in shown


def test_both_spellings_of_a_dtype(zoo, trees) -> None:
    engine = EngineTree(trees / "qwen2-bare", open_checkpoint(zoo("qwen2")), TOKENS)
    for short, name in (("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16"), ("q8", "q8")):
        assert engine.numerics(short) == engine.numerics(name) == name
        for spelling in (short, name):
            code, text = oracle("compare", trees / "qwen2", trees / "qwen2-bare", "--test-dtype", spelling, "--json")
            assert code == 0 and f'"{name}"' in text


def test_what_is_compared_the_wrong_way_round(trees, zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path / "half", TOKENS, positions="all", dtype="float16")

    def asked(reference: Path, test: Path) -> bool:
        return any("REFERENCE comes first" in note for note in compare(reference, test).notes)

    assert asked(tmp_path / "half", trees / "qwen2") and not asked(trees / "qwen2", tmp_path / "half")
    assert asked(trees / "qwen2-bare", trees / "qwen2") and not asked(trees / "qwen2", trees / "qwen2-bare")
    assert any("is compared with itself" in note for note in compare(trees / "qwen2", trees / "qwen2").notes)


def test_folders_and_files_that_are_no_tree(zoo, trees, tmp_path) -> None:
    (tmp_path / "npz" / "layer-0").mkdir(parents=True)
    np.savez(tmp_path / "npz" / "layer-0" / "attn_norm.npz", np.zeros(3))
    (tmp_path / "trace.zip").touch()
    (tmp_path / "trace.pt").touch()
    (tmp_path / "alone").mkdir()
    np.savez(tmp_path / "alone" / "trace.npz", np.zeros(3))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "Layer3_moe_expert_out.bin").touch()
    (tmp_path / "end").mkdir()
    (tmp_path / "end" / "7_lm_head.bin").touch()
    for folder, words in (
        (tmp_path / "end", "7_lm_head.bin seems to be lm_head, which is read at lm_head.bin"),
        (tmp_path / "flat", "seems to be moe_expert_out of layer 3, which is read at layer-3/moe_expert_out.bin"),
        (tmp_path / "npz", "it holds .npz, and .bin (APRT, see docs/engines.md), .npy and .safetensors are read"),
        (tmp_path / "trace.zip", "unpack it and give the folder"),
        (tmp_path / "trace.pt", "save the dictionary with safetensors.torch.save_file"),
        (tmp_path / "alone", "if trace.npz holds all tensors, give the file and not its folder"),
        (tmp_path / "alone" / "trace.npz", "holds no stage's tensor (called like layer-0/attn_norm)"),
        (zoo("qwen2"), "it looks like a model"),
        (trees, "in it looks like a tree"),
    ):
        assert all(words in line for line in refusals(zoo, trees, folder))


def test_single_files_of_other_formats(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.bin")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.zeros(5, np.float32).tofile(tmp_path / "raw.bin")
    for name, words in (
        ("a.bin", r"a NumPy array \(\.npy\), and \.bin"),
        ("a.npz", r"a zip \(\.npz, \.pt\)"),
        ("raw.bin", "bare float32 need the header of 12 bytes that docs/engines.md shows"),
    ):
        with pytest.raises(UserError, match=words):
            open_tensor(tmp_path / name)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_the_c_example_makes_folders_in_folders(tmp_path) -> None:
    main = "#include <string.h>\nint main(int n, char **a) { float x = 1; static char s[9000]; memset(s, 97, 8999);\n"
    source = tmp_path / "main.c"
    source.write_text(example("c") + main + 'return save(a[1], 3, "attn_norm", &x, 1) || !save(s, 0, "a", &x, 1); }')
    subprocess.run(["cc", "-Wall", "-Werror", source, "-o", tmp_path / "save"], check=True)
    subprocess.run([tmp_path / "save", tmp_path / "a" / "b" / "tree"], check=True)
    assert (tmp_path / "a" / "b" / "tree" / "layer-3" / "attn_norm.bin").stat().st_size == 16
