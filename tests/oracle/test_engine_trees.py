"""The first consumer's trees, by the conventions on record: `apr trace --save-tensor` and its Hugging Face script.

They lie as files in `tests/fixtures`, and `compare` reads them without an option.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxref.aprt import read_aprt
from oracle import compare
from oracle.report import as_text
from tests.fixtures.make import HERE, RECIPES, TREES, as_apr, make, put, read_recipe
from tests.trees import distance, write_tree

# Machines differ in the order of their sums: another instruction set gave 4e-7 in float32, the same bits in float16.
NEAR = {"float32": 5e-6, "float16": 2e-3}


@pytest.fixture(scope="module", params=[recipe.arch for recipe in RECIPES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of stored trees, and the reference tree of the checkpoint in their recipe."""
    stored, scratch = HERE / request.param, tmp_path_factory.mktemp(request.param)
    recipe = read_recipe(stored)
    checkpoint = recipe.checkpoint(scratch / "model")
    write_tree(checkpoint, scratch / "reference", list(recipe.tokens), positions="all")
    return stored, scratch / "reference"


@pytest.mark.parametrize("tree", ["apr", "apr-float16"])
def test_a_clean_tree_of_the_engine_is_clean(model, tree: str) -> None:
    stored, reference = model
    result = compare(reference, stored / tree)
    assert result.exit_code == 0, as_text(result)
    assert result.rules.dtype == TREES[tree][1]
    assert len(result.comparisons) == len(list((stored / tree).rglob("*.bin")))


def test_a_clean_tree_of_its_hugging_face_script_differs_in_layout_alone(model) -> None:
    stored, reference = model
    result = compare(reference, stored / "hf-script")
    assert result.exit_code == 0, as_text(result)
    assert "head-major" in as_text(result)
    assert {skip.key[1] for skip in result.skips} >= {"post_attn_residual"}


@pytest.mark.parametrize(("place", "divergences"), [((2, 1, 4), 0), ((2, 4, 1), 1)])
def test_a_fault_above_the_diagonal_is_none_and_below_it_is_one(
    model, tmp_path: Path, place: tuple[int, int, int], divergences: int
) -> None:
    stored, reference = model
    shutil.copytree(stored / "apr", tmp_path / "spoiled")
    tokens = len(read_recipe(stored).tokens)
    values = read_aprt(tmp_path / "spoiled" / "layer-1" / "attn_scores.bin")[1].reshape(-1, tokens, tokens).copy()
    values[place] += 1.0
    put(tmp_path / "spoiled", 1, "attn_scores", values)
    result = compare(reference, tmp_path / "spoiled")
    assert result.exit_code == divergences, as_text(result)
    assert [c.key for c in result.comparisons if not c.good] == [(1, "attn_scores")] * divergences


def test_another_missing_stage_is_still_missed(model, tmp_path: Path) -> None:
    stored, reference = model
    shutil.copytree(stored / "apr", tmp_path / "holes")
    for path in tmp_path.glob("holes/layer-*/attn_out.bin"):
        path.unlink()
    assert compare(reference, tmp_path / "holes").exit_code == 2


def test_the_conventions_are_in_the_stored_files(model) -> None:
    stored, _ = model
    tokens = len(read_recipe(stored).tokens)
    for tree in TREES:
        assert not list((stored / tree).glob("manifest.json"))
        assert (stored / tree / "layer-0" / "qkv_bias.bin").exists() == (stored.name == "qwen2")
        assert (stored / tree / "layer-0" / "post_attn_residual.bin").exists() == (tree != "hf-script")
        assert read_aprt(stored / tree / "lm_head.bin")[1].size == 272
        scores = read_aprt(stored / tree / "layer-1" / "attn_scores.bin")[1].reshape(-1, tokens, tokens)
        assert bool(np.triu(scores, 1).any()) == (tree == "hf-script")


def test_the_stored_files_are_what_the_generator_makes(model, tmp_path: Path) -> None:
    stored, _ = model
    recipe = read_recipe(stored)
    assert recipe in RECIPES, "made by another recipe: python -m tests.fixtures.make"
    make(recipe, tmp_path / recipe.arch)
    for tree, (_, dtype) in TREES.items():
        folders = stored / tree, tmp_path / recipe.arch / tree
        kept, made = ({p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()} for folder in folders)
        assert set(kept) == set(made)
        for name, path in kept.items():
            (layer, ours), (same, theirs) = read_aprt(path), read_aprt(made[name])
            assert layer == same
            assert distance(ours, theirs) <= (0 if "indices" in name.name else NEAR[dtype]), f"{tree}/{name}"


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_apr_convention_of_the_dump_has_the_bytes_of_the_engine(zoo, tmp_path: Path, name: str) -> None:
    tokens = RECIPES[0].tokens
    as_apr(zoo(name), tmp_path / "engine", tokens)
    write_tree(zoo(name), tmp_path / "dump", list(tokens), convention="apr")
    for path in (tmp_path / "engine").rglob("*.bin"):
        if "lm_head" in path.name:
            continue  # computed for one row alone there, for all rows here
        assert path.read_bytes() == (tmp_path / "dump" / path.relative_to(tmp_path / "engine")).read_bytes(), path
