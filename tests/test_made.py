"""A tree made in memory is the tree that a dump writes, and stands wherever a folder does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxref
import jaxref.model
from jaxref.named_tree import NamedTree
from oracle import assert_parity, compare
from oracle.explain import explain
from tests.conftest import prompt
from tests.gguf_writer import write_gguf
from tests.trees import write_tree
from weights import UserError, open_checkpoint
from weights.tiny import tiny_config, write_random

TOKENS = prompt(9, 272)


def tensors(tree: NamedTree) -> dict[str, np.ndarray]:
    """By one name each; the axes have to be as many as the array's."""
    found = {}
    for name, value in tree.items():
        for path, one in [(name, value)] if hasattr(value, "axes") else [(f"{name}/{s}", x) for s, x in value.items()]:
            assert one.axes is not None and len(one.axes) == len(one.shape) and one.name == path
            found[path] = one
    return found


def same_as_dumped(made: NamedTree, dumped: Path) -> None:
    """To the bit and in the same order, with the same words in the manifest."""
    ours, theirs = tensors(made), tensors(jaxref.load_tree(dumped))
    assert [*ours] == [*theirs]
    for name, one in theirs.items():
        assert (ours[name].shape, ours[name].axes, ours[name].dtype) == (one.shape, one.axes, one.dtype), name
        assert np.asarray(ours[name]).tobytes() == np.asarray(one).tobytes(), name
        assert not ours[name].values.flags.writeable
    stated = json.loads((dumped / "manifest.json").read_text("utf-8"))
    assert made.manifest is not None
    ours = json.loads(json.dumps(made.manifest))
    assert stated.pop("files") and stated.pop("format") == "safetensors" and ours.pop("format")
    assert ours == stated


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("qwen2", "float32", {}),
        ("moe", "float64", {}),
        ("qwen3", "bfloat16", {"stages": "attn_scores,ffn_out,lm_head", "positions": "2,5"}),
        ("moe", "float16", {"layers": "1,3", "positions": "all"}),
    ],
)
def test_it_is_the_dump(zoo, tmp_path: Path, name: str, dtype: str, wanted: dict) -> None:
    write_tree(zoo(name), tmp_path / "tree", TOKENS, dtype=dtype, form="safetensors", **wanted)
    same_as_dumped(jaxref.make_tree(zoo(name), np.asarray(TOKENS), dtype, **wanted), tmp_path / "tree")


def test_attention_in_blocks_is_put_together(zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxref.model, "SCORES_IN_BLOCK", 6 * 9 * 2)
    for positions in (None, "0,1,8"):
        folder = tmp_path / str(positions)
        write_tree(zoo("qwen2"), folder, TOKENS, form="safetensors", positions=positions)
        same_as_dumped(jaxref.make_tree(zoo("qwen2"), TOKENS, positions=positions), folder)


def test_activations_as_a_file_stores_weights(tmp_path: Path) -> None:
    write_random(tmp_path / "hf", tiny_config("qwen2", None, 2, hidden_size=96, intermediate_size=128), dtype="float32")
    file = write_gguf(tmp_path / "hf", tmp_path / "model.gguf", "Q8_0")
    write_tree(file, tmp_path / "tree", TOKENS, as_stored=True, form="safetensors")
    made = jaxref.make_tree(file, TOKENS, activations="stored")
    same_as_dumped(made, tmp_path / "tree")
    assert made.manifest is not None and made.manifest["activations"] == "q8"


def test_it_stands_where_a_folder_does(zoo) -> None:
    truth, half, engine = (jaxref.make_tree(zoo("qwen2"), TOKENS, dtype) for dtype in ("float64", "float16", "float16"))
    result = assert_parity(truth, engine, hf=half)
    assert result.trees["reference"].stated_dtype == "float64" and not result.skips
    assert explain(open_checkpoint(zoo("qwen2")), engine).found.verdict == "clean"  # the tokens are in the manifest
    with pytest.raises(UserError, match="are of other tokens"):
        compare(truth, jaxref.make_tree(zoo("qwen2"), TOKENS[::-1]))
    with pytest.raises(UserError, match="of different models"):
        compare(truth, jaxref.make_tree(zoo("qwen3"), TOKENS))


def test_and_so_does_a_loaded_one(zoo, tmp_path: Path) -> None:
    write_tree(zoo("qwen2"), tmp_path / "tree", TOKENS, dtype="float64")
    loaded = jaxref.load_tree(tmp_path / "tree")
    half = jaxref.make_tree(zoo("qwen2"), TOKENS, "bfloat16")
    result = assert_parity(loaded, half, hf=half)
    assert result.trees["reference"].folder == tmp_path / "tree"
    save_file({name: np.asarray(one) for name, one in tensors(half).items()}, tmp_path / "half.safetensors")
    result = assert_parity(loaded, jaxref.load_tree(tmp_path / "half.safetensors"), hf=half)
    assert result.trees["test"].folder == tmp_path / "half.safetensors"


def test_a_session_makes_it_from_what_it_holds(zoo, tmp_path: Path) -> None:
    with jaxref.Session(zoo("moe"), "bfloat16") as session:
        made = session.make_tree(TOKENS, positions="1,2")
        session.dump(TOKENS, tmp_path / "tree", form="safetensors", positions="1,2")
        same_as_dumped(made, tmp_path / "tree")
    write_tree(zoo("moe"), tmp_path / "alone", TOKENS, dtype="bfloat16", form="safetensors", positions="1,2")
    same_as_dumped(made, tmp_path / "alone")
    with pytest.raises(UserError, match="the session is closed"):
        session.make_tree(TOKENS)


def test_a_text_is_encoded(zoo, tmp_path: Path) -> None:
    made = jaxref.make_tree("tiny", "What is 2+2?", stages="embedding")
    shutil.copytree(zoo("qwen2"), tmp_path, dirs_exist_ok=True)
    assert made.manifest is not None
    tokenizer = open_checkpoint("tiny").tokenizer()
    assert tokenizer is not None and made.manifest["tokens"] == tokenizer.encode("What is 2+2?")
    assert made.manifest["prompt"] == "What is 2+2?"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="there is no tokenizer; give token ids instead of a text"):
        jaxref.make_tree(tmp_path, "What is 2+2?")
    assert repr(made).startswith("embedded in float32: jaxref, embedded, float32, ")


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1, 999_999], {}, "outside the vocabulary"),
        ([1.5], {}, "whole numbers were expected"),
        (TOKENS, {"dtype": "float8"}, "dtype 'float8' is not known"),
        (TOKENS, {"stages": "q_norm"}, "qwen2 has no stage q_norm"),
        (TOKENS, {"layers": "9"}, "this model has layers 0 to 3"),
        (TOKENS, {"positions": "9"}, "outside the prompt"),
        (TOKENS, {"activations": "all"}, "activations 'all' are not known"),
        (TOKENS, {"activations": "stored"}, "activations as stored go with a .gguf file in float32"),
        (TOKENS, {"device": "cuda"}, "JAX finds none"),
    ],
)
def test_what_cannot_be_made_is_one_line(zoo, given: object, options: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        jaxref.make_tree("tiny" if given == "" else zoo("qwen2"), given, **options)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)
