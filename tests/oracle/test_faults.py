"""Every planted fault is named by its first stage, and clean runs raise no alarm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oracle.comparer import compare
from oracle.report import as_text
from tests.conftest import prompt
from tests.oracle import faults
from tests.oracle.faults import FAULTS, model, run, write, write_reference
from weights.tiny import write_random

TOKENS = prompt(23, 272)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clean tiny Qwen2 in float64 (the reference), float32 and float16."""
    root = tmp_path_factory.mktemp("clean")
    params, config = model("qwen2")
    for dtype in ("float64", "float32", "float16"):
        write_reference(root / dtype, run(params, config, TOKENS, dtype), config, TOKENS, dtype)
    return root


@pytest.mark.parametrize("way", ["two", "three"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_by_its_first_stage(trees, tmp_path, name: str, dtype: str, way: str) -> None:
    fault = FAULTS[name]
    params, config = fault.change(*model("qwen2"))
    with fault.plant():
        trace = run(params, config, TOKENS, dtype)
    write(tmp_path, trace)  # an engine's: no manifest
    result = compare(trees / "float64", tmp_path, trees / dtype if way == "three" else None)
    assert result.verdict == "diverge"
    assert result.first is not None and result.first.key == fault.first, as_text(result)
    assert (result.last_good and result.last_good[1]) == fault.last_good
    assert result.blame.who == ("test" if way == "three" or "NaN" in name else "none")


def test_the_nan_is_named_by_its_coordinate(trees, tmp_path) -> None:
    fault = FAULTS["NaN at one position"]
    with fault.plant():
        write(tmp_path, run(*model("qwen2"), TOKENS, "float32"))
    first = compare(trees / "float64", tmp_path).first
    assert first is not None and first.coordinate == {"token": 3, "unit": 5}
    assert first.test.mismatched == 1


@pytest.mark.parametrize("way", ["two", "three"])
def test_head_major_is_named_as_a_layout(trees, tmp_path, way: str) -> None:
    params, config = model("qwen2")
    trace = run(params, config, TOKENS, "float16")

    def head_major(stage: str, x: np.ndarray) -> np.ndarray:
        if stage not in ("q_post_rope", "k_post_rope"):
            return x
        return x.reshape(len(TOKENS), -1, config.head_dim).transpose(1, 0, 2).reshape(x.shape)

    write(tmp_path, faults.map_trace(trace, head_major))
    hf = trees / "float16" if way == "three" else None
    result = compare(trees / "float64", tmp_path, hf)
    assert result.first is not None and result.first.key == (0, "q_post_rope")
    assert result.first.status == "layout" and "head-major [6, 23, 16]" in str(result.first.judgement.fault)
    assert {c.key[1] for c in result.comparisons if not c.good} == {"q_post_rope", "k_post_rope"}
    assert result.blame.who == "test"
    # As the yardstick it is put in order without a word of blame.
    assert compare(trees / "float64", trees / "float16", tmp_path).verdict == "agree"


def test_whose_fault_it_is(trees, tmp_path) -> None:
    """The same wrong theta in each of the three trees in turn."""
    params, config = FAULTS["rope theta"].change(*model("qwen2"))
    for dtype in ("float64", "float16"):
        trace = run(params, config, TOKENS, dtype)
        write_reference(tmp_path / dtype, trace, model("qwen2")[1], TOKENS, dtype)
    right, wrong = trees / "float16", tmp_path / "float16"
    test = compare(trees / "float64", wrong, right)
    assert (test.verdict, test.blame.who) == ("diverge", "test")
    reference = compare(tmp_path / "float64", right, right)
    assert (reference.verdict, reference.blame.who) == ("diverge", "reference")
    assert reference.first is not None and reference.first.key == (0, "q_post_rope")
    hf = compare(trees / "float64", right, wrong)
    assert (hf.verdict, hf.blame.who) == ("agree", "hf")


@pytest.mark.parametrize("seed", range(20))
def test_clean_runs_raise_no_alarm(tmp_path, seed: int) -> None:
    """Hugging Face against float64, with jaxref as the yardstick, and the other way round; and both without one."""
    hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
    arch, count = ("qwen2", "qwen3", "qwen3_moe")[seed % 3], (7, 23, 60)[seed // 3 % 3]
    tokens = [(seed + token) % 272 for token in prompt(count, 272)]
    params, config = model(arch, seed)
    write_random(tmp_path / "model", faults.tiny_config(arch), seed=seed, dtype="float32")
    truth = run(params, config, tokens, "float64")
    write_reference(tmp_path / "float64", truth, config, tokens, "float64", last=False)
    for dtype in ("float32", "float16", "bfloat16"):
        ours = run(params, config, tokens, dtype)
        write_reference(tmp_path / dtype, ours, config, tokens, dtype, last=False)
        theirs = hf.capture(hf.load(tmp_path / "model", dtype), tokens)
        write(tmp_path / f"hf-{dtype}", theirs, last=False)
        pairs = [(f"hf-{dtype}", dtype), (dtype, f"hf-{dtype}"), (f"hf-{dtype}", None), (dtype, None)]
        for test, yardstick in pairs:
            third = tmp_path / yardstick if yardstick else None
            result = compare(tmp_path / "float64", tmp_path / test, third)
            assert result.verdict == "agree" and result.blame.who == "none", as_text(result)
