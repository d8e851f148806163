"""Verdicts that were wrong: a yardstick that hid faults, dumps that are not what was used, NaN told as no error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from oracle.explain import MISREAD, Explained, explain
from oracle.local import Local
from oracle.localize import localize
from oracle.told import _came_in, print_told, sentence
from oracle.told_json import records
from tests.conftest import prompt
from tests.oracle.standin import Planted, norms, run, write
from tests.oracle.sweep import LAYER, Models
from tests.trees import write_tree
from weights import UserError, open_checkpoint
from weights.tiny import write_random

TOKENS = prompt(23, 272)
CLEAN = Planted("", ())
LAYERS = range(4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def trace_of(models: Models, arch: str, faults: dict | None = None, dtype: str = "float32") -> dict:
    raw, weights, _ = models.get(arch, CLEAN)
    return run(raw, weights, TOKENS, dtype, faults or {})


def told_of(models: Models, arch: str, folder: Path, trace: dict, **options) -> Explained:
    write(folder, trace)
    return explain(models.get(arch, CLEAN)[2], folder, TOKENS, **options)


def names(told: Explained) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {fault.stage: set() for fault in told.found.faults}
    for cause in told.causes:
        found[cause.stage].add(cause.explanation.hypothesis if cause.explanation else None)
    return found


def shown(told: Explained, capsys: pytest.CaptureFixture[str]) -> str:
    print_told(told)
    return " ".join(capsys.readouterr().out.split())


# --- yardsticks


def test_a_yardstick_of_another_run_is_refused(models: Models, tmp_path: Path) -> None:
    raw, _, checkpoint = models.get("qwen2", CLEAN)
    write(tmp_path / "engine", trace_of(models, "qwen2", {"rope_interleaved": None}))
    write_random(tmp_path / "seed", raw, seed=4, dtype="float32")
    others = {
        "of another model: model_type qwen3": (models.get("qwen3", CLEAN)[2].folder, TOKENS, "float32"),
        "of another model: it was made from other bytes": (tmp_path / "seed", TOKENS, "float32"),
        "of other tokens": (checkpoint.folder, TOKENS[::-1], "float32"),
        "computes in float16, the engine in float32": (checkpoint.folder, TOKENS, "float16"),
    }
    for number, (says, (model, tokens, dtype)) in enumerate(others.items()):
        write_tree(model, tmp_path / str(number), tokens, dtype=dtype, stages="attn_norm,lm_head")
        with pytest.raises(UserError, match=says) as refused:
            localize(checkpoint, tmp_path / "engine", TOKENS, hf=tmp_path / str(number))
        assert "\n" not in str(refused.value)
    write_tree(checkpoint.folder, tmp_path / "right", TOKENS)
    assert localize(checkpoint, tmp_path / "engine", TOKENS, hf=tmp_path / "right").verdict == "faulty"


@pytest.mark.parametrize("block", [None, 100])
@pytest.mark.parametrize(
    ("fault", "stages"),
    [
        ("rope_interleaved", {"q_post_rope", "k_post_rope"}),
        ("embedding_scaled/2", {"embedding"}),
        ("logits_scaled/0.5", {"lm_head"}),
    ],
)
def test_a_faulty_yardstick_hides_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, stages: set[str], block: int | None
) -> None:
    if block is not None:  # the head in several blocks
        monkeypatch.setattr("oracle.localize.head_rows", lambda config: block)
    checkpoint = models.get("qwen2", CLEAN)[2]
    write(tmp_path / "engine", trace_of(models, "qwen2", {fault: None}))
    write(tmp_path / "right", trace_of(models, "qwen2"))
    for hf, noted in (("engine", True), ("right", False)):
        found = localize(checkpoint, tmp_path / "engine", TOKENS, hf=tmp_path / hf)
        assert {f.stage for f in found.faults} == stages
        assert any("the yardstick is itself wrong at" in note for note in found.notes) is noted


# --- dumps that are not what the next stage used


def holds(**stages: str) -> Callable[[dict], dict]:
    """A trace in whose every layer a stage's file holds another stage."""
    return lambda trace: trace | {(n, a): trace[n, b] for n in LAYERS for a, b in stages.items() if (n, b) in trace}


def next_layers(trace: dict) -> dict:
    changed = {(n, "post_ffn_residual"): trace[n + 1, "post_attn_residual"] for n in LAYERS[:-1]}
    return trace | changed | {(0, "embedding"): trace[0, "post_attn_residual"]}


def without_silu(trace: dict) -> dict:
    return {key: value for key, value in holds(ffn_gate="ffn_silu")(trace).items() if key[1] != "ffn_silu"}


def normed_in_place(trace: dict) -> dict:
    return trace | {(LAYERS[-1], "post_ffn_residual"): trace[None, "final_norm"]}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("arch", "change", "dumps", "right"),
    [
        ("qwen2", holds(qkv_matmul="qkv_bias"), {"qkv_matmul"}, "qkv_bias is right"),
        ("qwen2", holds(post_attn_residual="post_ffn_residual"), {"post_attn_residual"}, "ffn_norm and post_ffn_res"),
        ("qwen2", holds(attn_scores="attn_softmax"), {"attn_scores"}, "attn_softmax is right"),
        ("qwen2", next_layers, {"post_ffn_residual", "embedding"}, "attn_norm and post_attn_residual are right"),
        ("qwen2", normed_in_place, {"post_ffn_residual"}, "final_norm is right"),
        ("qwen3", holds(q_post_rope="q_norm"), {"q_post_rope"}, "attn_scores is right"),
        ("qwen3", holds(ffn_gate="ffn_silu"), {"ffn_gate"}, "ffn_silu is right"),
        ("qwen3", holds(ffn_gate="ffn_swigl", ffn_silu="ffn_swigl"), {"ffn_gate", "ffn_silu"}, "ffn_swigl is right"),
        ("qwen3", without_silu, {"ffn_gate"}, "ffn_swigl is right"),
        ("qwen3_moe", holds(moe_expert_gate="moe_expert_swigl"), {"moe_expert_gate"}, "moe_expert_swigl is right"),
    ],
)
def test_a_dump_that_was_not_used_is_blamed_and_not_the_stage_after_it(
    models: Models, tmp_path: Path, arch: str, change: Callable[[dict], dict], dumps: set[str], right: str, dtype: str
) -> None:
    told = told_of(models, arch, tmp_path, change(trace_of(models, arch, dtype=dtype)))
    assert names(told) == {stage: {MISREAD} for stage in dumps}
    assert right in sentence(told) and "holds dumps" in sentence(told)
    localized = Explained(told.found)
    assert right in sentence(localized)
    assert told.found.exit_code == 1


def test_a_real_fault_beside_a_dump_that_was_not_used(models: Models, tmp_path: Path) -> None:
    """Each for itself, at two inputs of one stage."""
    trace = trace_of(models, "qwen2", {"weight_transposed/down_proj": {LAYER}})
    told = told_of(models, "qwen2", tmp_path, holds(post_attn_residual="post_ffn_residual")(trace))
    assert names(told) == {"post_attn_residual": {MISREAD}, "ffn_out": {"weight_transposed"}}
    assert "computes wrongly" in sentence(told)


def test_a_fault_that_the_next_stage_used_is_no_wrong_dump(models: Models, tmp_path: Path) -> None:
    both = {"bias_missing": {LAYER}, "rope_interleaved": {LAYER}}
    told = told_of(models, "qwen2", tmp_path, trace_of(models, "qwen2", both))
    assert names(told) == {
        "qkv_bias": {"bias_missing"},
        "q_post_rope": {"rope_interleaved"},
        "k_post_rope": {"rope_interleaved"},
    }
    assert not any(row.past for row in told.found.locals)


# --- values that are not finite


def test_nan_is_told_as_nan(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_of(models, "qwen2", tmp_path, trace_of(models, "qwen2", {"nan_value/attn_out": {0}}))
    (fault,) = told.found.faults
    assert (fault.stage, fault.layers, fault.spared, fault.tainted) == ("attn_out", (0,), (), (1, 2, 3))
    text, says = shown(told, capsys), "attn_out in layer 0, 1 of 1656 values is NaN (first at token 3)"
    assert says in sentence(told) and "where rounding makes" not in sentence(told)
    assert "values 1 of 1656 values is NaN (first at token 3) at layer-0/attn_out" in text
    assert "not finite in layers 1-3, as its inputs there" in text and "right in layers" not in text
    assert "e+308" not in text and "from the truth" not in text and "n: not finite" in text
    (summary,) = (r for r in records(told, explained=True) if r["record"] == "summary")
    assert summary["faults"][0]["spared"] == [] and summary["faults"][0]["tainted"] == [1, 2, 3]
    where = summary["faults"][0]["where"]
    assert where["token"] == 3 and where["token_rel_l2"] is None and where["tokens_wrong"] == 1


def test_what_is_infinite_is_not_called_nan() -> None:
    where = {"token": 2}
    assert Local((0, "ffn_up"), 0, 0, 0, bad=2, values=9, where=where).not_finite == (
        "2 of 9 values are infinite (first at token 2)"
    )
    assert "are NaN or infinite" in Local((0, "ffn_up"), 0, 0, 0, bad=2, nan=1, values=9).not_finite


# --- words


def test_stages_of_the_whole_model_and_single_ones(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told_of(models, "qwen2", tmp_path / "head", trace_of(models, "qwen2", {"logits_scaled/0.5": None}))
    text = shown(told, capsys)
    assert "its own inputs: lm_head, " in text and "once in the model" not in text
    trace = trace_of(models, "qwen2")
    told = told_of(models, "qwen2", tmp_path / "one", {(0, "embedding"): trace[0, "embedding"]})
    assert sentence(told).startswith("clean: the one stage of one is what")


def test_a_window_that_the_config_has_not(models: Models, tmp_path: Path) -> None:
    told = told_of(models, "qwen2", tmp_path, trace_of(models, "qwen2", {"window/5": None}))
    assert "a sliding window of 5 (the config has none)" in sentence(told)


def test_growth_is_said_of_an_error_that_came_in() -> None:
    row = Local((0, "ffn_up"), 0.5, 1e-7, 4e-7, accumulated=0.6, inherited=0.2)
    assert _came_in(row) == ", 0.2 of it came in, 3 times"
    within = Local((0, "ffn_up"), 0.5, 1e-7, 4e-7, accumulated=0.5, inherited=2e-7)
    assert _came_in(within) == ", 2e-07 of it came in"
    drowned = Local((0, "ffn_up"), 0.5, 1e-7, 4e-7, accumulated=0.5, inherited=1e-3)
    assert "times" not in _came_in(drowned)


# --- an eps outside the root


@pytest.mark.parametrize(("way", "outside"), [("root", True), ("reciprocal", True), ("cube", False)])
def test_an_eps_outside_the_root_is_no_other_eps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, outside: bool
) -> None:
    """What is neither an eps inside nor one outside gets no name, though a fitted eps comes near it."""
    models = Models(tmp_path / "models")
    models.root.mkdir()
    wide = Planted("", (), config={"rms_norm_eps": 1e-3})
    raw, weights, checkpoint = models.get("qwen3", wide)
    eps, normal = 1e-3, norms._normed

    def normed(here, stage: str, x: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
        if stage != "ffn_norm":
            return normal(here, stage, x, over)
        size = x.square().mean(over, keepdim=True)
        root = size.sqrt()
        return x * {"root": 1 / (root + eps), "reciprocal": 1 / root + eps, "cube": 1 / (root + eps * size**2)}[way]

    monkeypatch.setattr(norms, "_normed", normed)
    write(tmp_path / "engine", run(raw, weights, TOKENS, "float32"))
    told = explain(open_checkpoint(checkpoint.folder), tmp_path / "engine", TOKENS)
    assert names(told) == {"ffn_norm": {"eps_outside" if outside else None}}
    assert not outside or {c.explanation and c.explanation.parameter for c in told.causes} == {way}
    assert np.all([row.faulty for row in told.found.locals if row.key[1] == "ffn_norm"])
