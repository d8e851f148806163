"""float32 against Hugging Face's own modules, run eagerly in float32 and captured stage by stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxref
from tests.conftest import ZOO, prompt
from tests.trees import distance, distances, flat, read_tree, write_tree
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
CASES = [(name, count) for name in ZOO for count in (7, 300)]
LOOSE = ("attn_softmax", "attention")  # a softmax's relative error is the absolute error of its scores


def bound(path: str) -> float:
    return 3e-5 if path.split("/")[-1].removesuffix(".bin") in LOOSE else 5e-6


@pytest.mark.parametrize(("name", "count"), CASES)
def test_float32_agrees_with_hugging_face(zoo, tmp_path, name: str, count: int) -> None:
    """What is compared is what the dump wrote, for all positions."""
    folder = zoo(name)
    tokens = prompt(count, json.loads((folder / "config.json").read_text())["vocab_size"])
    reference = flat(hf.capture(hf.load(folder), tokens))
    write_tree(folder, tmp_path / "tree", tokens, positions="all")
    ours = read_tree(tmp_path / "tree")
    assert set(ours) == {f"{path}.bin" for path in reference}
    far = {path: distance(ours[f"{path}.bin"], value) for path, value in reference.items()}
    assert {path: d for path, d in far.items() if not d <= bound(path)} == {}
    check_routing(reference, ours)


def check_routing(reference: dict, ours: dict) -> None:
    """The same experts, weights that sum to one where they are renormalised, and nothing that is not finite."""
    assert all(np.isfinite(values).all() for values in ours.values())
    for path in (path for path in reference if path.endswith("moe_router_indices")):
        np.testing.assert_array_equal(ours[f"{path}.bin"], reference[path].ravel())


@pytest.fixture(scope="module")
def layer_of_the_30b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts, 8 a token, the widths of Qwen3-Coder-30B-A3B: 1.3 GB."""
    folder = tmp_path_factory.mktemp("30b") / "model"
    write_random(folder, tiny_config("qwen3_moe", "30b-a3b", 1, vocab_size=512))
    return folder


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_layer_shape_of_the_30b_agrees(layer_of_the_30b: Path, tmp_path: Path, count: int) -> None:
    """Router indices but for ties below 1e-6."""
    folder, tokens = layer_of_the_30b, prompt(count, 512)
    reference = flat(hf.capture(hf.load(folder), tokens))
    write_tree(folder, tmp_path / "tree", tokens, positions="all")
    ours = read_tree(tmp_path / "tree")
    tied = tied_positions(reference, ours)
    assert len(tied) <= count / 100
    far = {path: without(path, ours[f"{path}.bin"], value, tied) for path, value in reference.items()}
    assert {path: d for path, d in far.items() if not d <= bound(path)} == {}


def tied_positions(reference: dict, ours: dict) -> list[int]:
    """Positions whose experts are in another order because two router logits are the same to 1e-6."""
    ids, logits = (reference[f"layer-0/moe_router{part}"] for part in ("_indices", "_logits"))
    other = ours["layer-0/moe_router_indices.bin"].reshape(ids.shape)
    tied = np.flatnonzero((ids != other).any(axis=1)).tolist()
    for position in tied:
        mine, theirs = (logits[position, each[position].astype(int)] for each in (other, ids))
        assert np.abs(mine - theirs).max() < 1e-6, f"no tie at position {position}"
    return tied


def without(path: str, ours: np.ndarray, reference: np.ndarray, tied: list[int]) -> float:
    """The distance, of what goes by an expert's rank without the tied positions."""
    if not path.endswith("moe_router_indices") and "moe_expert_" not in path:
        return distance(ours, reference)
    return distance(*(np.delete(values.reshape(reference.shape), tied, axis=0) for values in (ours, reference)))


@pytest.mark.parametrize("name", ["moe", "moe-64", "moe-sparse"])
def test_all_experts_and_chosen_experts_agree(zoo, tmp_path, name: str) -> None:
    """The pure forward and the dump, which reads only the chosen experts."""
    folder, tokens = zoo(name), prompt(100, 272)
    write_tree(folder, tmp_path / "tree", tokens, positions="all")
    checkpoint = open_checkpoint(folder)
    trace = flat(jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config))
    ours = read_tree(tmp_path / "tree")
    assert max(distance(ours[f"{path}.bin"], value) for path, value in trace.items()) <= 2e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "moe-sparse"])
def test_half_precision_follows_hugging_face_roundings(zoo, name: str, dtype: str) -> None:
    """Stage for stage the bits of Hugging Face's half precision, but for sums in another order."""
    folder = zoo(name)
    tokens = prompt(7, 272)
    reference = hf.capture(hf.load(folder, dtype), tokens)
    checkpoint = open_checkpoint(folder)
    ours = jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config, dtype)
    truth = jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config, "float64")
    near, far = distances(ours, reference), distances(reference, truth)
    # Where the same roundings are made, the two are much nearer to each other than either is to the truth.
    assert {k: (near[k], far[k]) for k in near if k.startswith("layer-0/") and near[k] > 0.5 * far[k]} == {}


def test_the_streamed_dump_is_the_same(zoo, tmp_path) -> None:
    """What is written is what was compared: `dump` against the trace of `forward`, byte for byte."""
    folder = zoo("qwen2-0.5b")
    tokens = prompt(7, 4096)
    write_tree(folder, tmp_path / "tree", tokens, positions="all")
    checkpoint = open_checkpoint(folder)
    trace = jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config)
    for path, values in read_tree(tmp_path / "tree").items():
        layer, _, stage = path.removesuffix(".bin").rpartition("/")
        expected = trace[layer][stage] if layer else trace[stage]
        np.testing.assert_array_equal(values, np.asarray(expected).ravel(), err_msg=path)
