"""Loading a tree for a notebook: the right values in the right shapes, lazily, and one line for each mistake."""

from __future__ import annotations

import json
import mmap
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxref
from jaxref.loaded import load_tree
from jaxref.stages import STAGES, keys_of
from jaxref.tree import SUFFIXES
from tests.conftest import PROMPT
from tests.fixtures.make import HERE
from tests.trees import write_tree
from weights import UserError, open_checkpoint


@pytest.fixture(scope="module", params=["aprt", "safetensors"])
def dumped(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("loaded") / "tree"
    write_tree(zoo("moe"), folder, list(PROMPT), form=request.param)
    return folder, request.param


def test_it_is_the_forward_by_the_same_paths(dumped, zoo) -> None:
    tree, checkpoint = load_tree(dumped[0]), open_checkpoint(zoo("moe"))
    trace = jaxref.forward(checkpoint.params(), np.asarray(PROMPT), checkpoint.config)
    keys = [(f"layer-{n}" if n is not None else None, stage) for n, stage in keys_of(checkpoint.config)]
    assert [(k, s) for k in tree for s in (tree[k] if k.startswith("layer") else [k])] == [(k or s, s) for k, s in keys]
    for layer, stage in keys:
        found = tree[layer][stage] if layer else tree[stage]
        expected = np.asarray(trace[layer][stage] if layer else trace[stage])
        expected = expected[-1:] if STAGES[stage].last else expected
        assert found.axes == STAGES[stage].axes
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_read_until_it_is_asked_for(dumped, tmp_path: Path) -> None:
    folder, form = dumped
    shutil.copytree(folder, tmp_path / "tree")
    broken = tmp_path / "tree" / "layer-0" / f"attn_norm.{SUFFIXES[form]}"
    broken.write_bytes(b"nothing")
    tree = load_tree(tmp_path / "tree")
    values = tree["layer-0"]["attn_out"].values
    assert not values.flags.writeable
    owner = values
    while not isinstance(owner, mmap.mmap):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
        assert owner is not None, "a copy in memory"
    with pytest.raises(UserError, match=r"attn_norm"):
        tree["layer-0"]["attn_norm"]


def test_a_tensor_is_an_array_with_names(dumped) -> None:
    tree = load_tree(dumped[0])
    scores, queries = tree["layer-1/attn_scores"], tree["layer-1"]["q_post_rope"]
    assert queries.sizes == {"S": 7, "Hh": 96}
    assert scores.sizes == {"H": 6, "S": 7, "S'": 7}
    assert repr(queries).startswith("layer-1/q_post_rope  float32 [S=7, Hh=96]  q after RoPE  min ")
    for plain in (queries - 1, queries[2], np.asarray(queries), 2 * queries):
        assert type(plain) is np.ndarray
    assert jnp.asarray(queries).shape == (7, 96)
    np.testing.assert_array_equal(queries + queries, 2 * queries.values)
    assert np.asarray(queries, np.float64).dtype == np.float64


def test_half_precision_and_chosen_positions(zoo, tmp_path: Path) -> None:
    write_tree(zoo("qwen2"), tmp_path / "t", list(PROMPT), form="safetensors", dtype="bfloat16", positions="1,3")
    softmax = load_tree(tmp_path / "t")["layer-0"]["attn_softmax"]
    assert softmax.dtype == ml_dtypes.bfloat16
    assert softmax.sizes == {"H": 6, "S": 2, "S'": 7}


def test_a_tree_without_a_manifest_is_flat_and_says_so(tmp_path: Path) -> None:
    shutil.copytree(HERE / "qwen2" / "apr", tmp_path / "engine")
    (tmp_path / "engine" / "layer-1" / "post_ffn_residual.bin").rename(tmp_path / "engine/layer-1/layer_output.bin")
    shutil.copy(tmp_path / "engine" / "layer-1" / "attn_out.bin", tmp_path / "engine" / "layer-1" / "my_own.bin")
    tree = load_tree(tmp_path / "engine")
    found = tree["layer-1"]["Layer_Output"]
    assert found.axes is None
    assert found.shape == (5 * 72,)
    assert "axes unknown" in repr(found)
    assert "no manifest" in repr(tree)
    assert list(tree["layer-1"])[-2:] == ["post_ffn_residual", "my_own"]
    np.testing.assert_array_equal(tree["layer-1"]["my_own"], tree["layer-1"]["attn_out"])


def test_it_behaves_as_a_mapping(dumped) -> None:
    tree = load_tree(dumped[0])
    assert "layer-0" in tree
    assert "layer-9" not in tree
    assert "layer-0/ffn_silu" not in tree
    assert tree.get("nonsense") is None
    assert set(dict(tree["layer-1"])) == set(tree["layer-1"])
    assert len(tree) == len(list(tree))


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_said_with_what_is_there(dumped, tmp_path: Path) -> None:
    tree = load_tree(dumped[0])
    with pytest.raises(UserError) as error:
        tree["layer-9"]
    assert "no 'layer-9'" in said(error)
    assert "layer-0, layer-1" in said(error)
    with pytest.raises(UserError) as error:
        tree["layer-0"]["ffn_silu"]
    assert "layer-0 has no stage 'ffn_silu'; it has" in said(error)
    assert "moe_router" in said(error)
    with pytest.raises(UserError) as error:
        load_tree(tmp_path / "nowhere")
    assert "no such folder" in said(error)
    with pytest.raises(UserError) as error:
        load_tree(tmp_path)
    assert "holds no stage's file" in said(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [7, 71]}, "holds 504 values"),
        ({"shape": "7 x 72"}, "holds 504 values"),
        ({"axes": ["S"]}, "holds 504 values"),
    ],
)
def test_a_manifest_that_does_not_fit_is_said(dumped, tmp_path: Path, change: dict, words: str) -> None:
    folder, _ = dumped
    shutil.copytree(folder, tmp_path / "tree")
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["stage"] == "attn_norm":
            entry |= change
    (tmp_path / "tree" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        load_tree(tmp_path / "tree")["layer-0"]["attn_norm"]
    assert words in said(error)


def test_two_files_of_one_stage_and_a_wrong_header_are_said(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(HERE / "qwen2" / "apr", engine)
    shutil.copy(engine / "layer-0" / "attn_out.bin", engine / "layer-1" / "attn_out.bin")
    with pytest.raises(UserError) as error:
        load_tree(engine)["layer-1"]["attn_out"]
    assert "its header says layer 0, its place says 1" in said(error)
    shutil.copy(engine / "layer-0" / "post_ffn_residual.bin", engine / "layer-0" / "layer_output.bin")
    with pytest.raises(UserError) as error:
        load_tree(engine)
    assert "are the same stage" in said(error)


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_one_file_of_all_tensors_is_a_tree_too(dumped, tmp_path: Path, form: str) -> None:
    tree, path = load_tree(dumped[0]), tmp_path / f"all.{form}"
    save = {"safetensors": save_file, "npz": lambda arrays, path: np.savez(path, **arrays)}[form]
    names = ["layer-1/attn_norm", "layer-0/attn_scores", "lm_head"]
    others = {"layer-1/my_own": np.ones(3), "mask": np.ones(3, bool)}
    save({name: np.array(tree[name]) for name in names} | others, path)
    found = load_tree(path)
    with pytest.raises(UserError, match=r"'mask' is stored as 'BOOL'|mask\.npy: holds '.b1'"):
        found["mask"]
    assert (list(found), list(found["layer-1"])) == (["layer-0", "layer-1", "lm_head", "mask"], ["attn_norm", "my_own"])
    for name in names:
        np.testing.assert_array_equal(found[name], tree[name])
    save({"layer-0/attn_norm": np.ones(3), "layer-00/ATTN_NORM": np.ones(3)}, path)
    with pytest.raises(UserError, match="are the same stage"):
        load_tree(path)
