"""ATTN-SUB-003, ATTN-SUB-004, APR-TRACE-SAVE-009 and MOE-SUB-003: what a comparer must see."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxref.aprt import aprt_header
from oracle.__main__ import main
from oracle.comparer import compare
from oracle.diff import diff
from oracle.rules import Options
from tests.conftest import PROMPT, prompt
from tests.trees import write_tree
from weights import UserError

CHAIN = (
    "attn_norm qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax attention attn_out"
).split()  # the stage contract's bisection rule
rng = np.random.default_rng(0)


def aprt(path: Path, values: np.ndarray, layer: int | None = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(aprt_header(layer, values.shape) + values.astype("<f4").tobytes())
    return path


def change(path: Path, scale: float) -> None:
    """Add noise of a relative size to a file in place."""
    data = path.read_bytes()
    values = np.frombuffer(data[12:], "<f4")
    noise = rng.standard_normal(values.size) * scale * np.sqrt(np.mean(values.astype(float) ** 2))
    path.write_bytes(data[:12] + (values + noise).astype("<f4").tobytes())


def test_attn_sub_003_diff_is_blind_to_the_name_and_sees_a_small_change(tmp_path) -> None:
    scores = rng.standard_normal((4, 7, 7)).astype(np.float32)
    softmax = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    a = aprt(tmp_path / "layer-0" / "attn_softmax.bin", softmax)
    b = aprt(tmp_path / "layer-0" / "anything.bin", softmax)
    assert diff(a, b)["cosine_sim"] == pytest.approx(1.0, abs=1e-12)
    changed = softmax.copy()
    changed[2, 5, 3] += 0.05
    found = diff(a, aprt(tmp_path / "c.bin", changed))
    assert found["cosine_sim"] < 1 - 1e-6
    assert found["max_abs_diff_index"] == np.ravel_multi_index((2, 5, 3), softmax.shape)


@pytest.mark.parametrize("place", range(1, len(CHAIN)))
def test_attn_sub_004_a_planted_fault_is_narrowed_to_one_adjacent_pair(zoo, tmp_path, place: int) -> None:
    write_tree(zoo("qwen2"), tmp_path / "ref", list(PROMPT), stages=",".join(CHAIN))
    shutil.copytree(tmp_path / "ref", tmp_path / "test")
    for stage in CHAIN[place:]:
        change(tmp_path / "test" / "layer-1" / f"{stage}.bin", 0.08)  # cosine about 0.9966, the engine's case on record
    for stage in CHAIN[:place]:
        change(tmp_path / "test" / "layer-1" / f"{stage}.bin", 3e-4)  # and 0.99999995
    (tmp_path / "test" / "manifest.json").unlink()
    result = compare(tmp_path / "ref", tmp_path / "test", options=Options(min_cosine=0.999))
    assert result.first is not None and result.first.key == (1, CHAIN[place])
    assert result.last_good == (1, CHAIN[place - 1])
    layer = [c for c in result.comparisons if c.key[0] == 1]
    flips = [b.key[1] for a, b in itertools.pairwise(layer) if a.test.cosine >= 0.999 > b.test.cosine]
    assert flips == [CHAIN[place]]


def test_apr_trace_save_009_diff_refuses_other_counts_and_layers(tmp_path) -> None:
    a = aprt(tmp_path / "a.bin", np.ones(5), 0)
    for other, words in (
        (aprt(tmp_path / "b.bin", np.ones(6), 0), ("dim_product", "5", "6")),
        (aprt(tmp_path / "c.bin", np.ones(5), 3), ("layer", "0", "3")),
        (aprt(tmp_path / "d.bin", np.ones(5), None), ("layer", "0", "whole-model")),
    ):
        with pytest.raises(UserError) as refusal:
            diff(a, other)
        assert all(word in str(refusal.value) for word in (str(a), str(other), *words))


def test_moe_sub_003_the_first_stage_with_a_nan_is_named(zoo, tmp_path) -> None:
    write_tree(zoo("moe"), tmp_path / "ref", prompt(7, 272))
    shutil.copytree(tmp_path / "ref", tmp_path / "test")
    for path in ("layer-2/moe_expert_up", "layer-2/moe_expert_out", "layer-3/attn_norm"):
        file = tmp_path / "test" / f"{path}.bin"
        file.write_bytes(file.read_bytes()[:-4] + np.uint32(0x7FC00000).tobytes())
    result = compare(tmp_path / "ref", tmp_path / "test")
    assert result.first is not None and result.first.key == (2, "moe_expert_up")
    assert result.first.test.bad_test == 1 and result.blame.who == "test"


def test_diff_has_the_engine_schema_and_numpy_figures(tmp_path) -> None:
    a, b = rng.standard_normal((2, 150_000)).astype(np.float32)
    files = aprt(tmp_path / "a.bin", a, 4), aprt(tmp_path / "b.bin", b, 4)
    found = CliRunner().invoke(main, ["diff", *map(str, files), "--limit", "3", "--json"], standalone_mode=False)
    record = json.loads(found.output)
    assert list(record) == (
        "schema path_a path_b layer dim_product max_abs_diff max_abs_diff_index rms_diff cosine_sim top_diffs".split()
    )
    x, y = a.astype(np.float64), b.astype(np.float64)
    order = np.argsort(-np.abs(x - y))[:3]
    assert (record["schema"], record["layer"], record["dim_product"]) == ("apr-stage-diff-v1", 4, 150_000)
    assert [top["index"] for top in record["top_diffs"]] == order.tolist()
    assert [top["abs_diff"] for top in record["top_diffs"]] == np.abs(x - y)[order].tolist()
    assert (record["max_abs_diff"], record["max_abs_diff_index"]) == (np.abs(x - y).max(), order[0])
    assert record["rms_diff"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-12)
    assert record["cosine_sim"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)


def test_diff_of_zeros_nan_and_nothing(tmp_path) -> None:
    zeros = aprt(tmp_path / "zeros.bin", np.zeros(4), None)
    assert diff(zeros, zeros)["cosine_sim"] == 0.0 and diff(zeros, zeros)["layer"] == "whole-model"
    nan = aprt(tmp_path / "nan.bin", np.array([0, 3, np.nan, 1]), None)
    found = diff(zeros, nan, limit=2)
    assert [top["index"] for top in found["top_diffs"]] == [2, 1]
    assert found["top_diffs"][0] == {"index": 2, "a": 0.0, "b": None, "abs_diff": None}
    json.dumps(found, allow_nan=False)
    nothing = aprt(tmp_path / "nothing.bin", np.zeros(0), None)
    with pytest.raises(UserError, match="nothing to compare"):
        diff(nothing, nothing)
    for path in (tmp_path, tmp_path / "nowhere.bin"):
        with pytest.raises(UserError):
            diff(zeros, path)
