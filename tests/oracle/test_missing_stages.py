"""Faults in stages that the tree lacks are named at the next one that it has: fused attention, hidden states alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxref.stages import STAGES
from oracle.explain import Explained, explain
from oracle.local import TELLS
from oracle.told import sentence
from tests.conftest import prompt
from tests.oracle.standin import FAULTS, Planted, run, write
from tests.oracle.sweep import LAYER, LAYERS, SHORT, Models, Outcome, sweep, table
from weights import Checkpoint, open_checkpoint

FUSED = ("attn_scores", "attn_softmax")
HIDDEN = ("embedding", "post_attn_residual", "post_ffn_residual", "final_norm", "lm_head")
INSIDE = ("moe_router_logits", *(name for name in STAGES if name.startswith("moe_expert_")))
# q·k depends on the distance of two positions alone, and a norm takes a scale away: in what follows nothing is wrong.
UNSEEN = ("rope_positions", "qkv_scaled")


@pytest.mark.parametrize(
    ("arch", "layers", "lost"),
    [
        ("qwen2", LAYERS["qwen2"], FUSED),
        ("qwen3_moe", LAYERS["qwen3_moe"], (*FUSED, *INSIDE)),
        # What earlier layers had is tried first, and what was in vain no more: of so few stages each has its own run.
        ("qwen3", (LAYER,), tuple(name for name in STAGES if name not in HIDDEN)),
    ],
)
def test_every_fault_of_the_catalogue_through_missing_stages(
    tmp_path: Path, arch: str, layers: tuple[int, ...], lost: tuple[str, ...]
) -> None:
    outcomes: list[Outcome] = list(sweep(tmp_path, arch, "float32", layers, lost=lost))
    print(table(outcomes))
    assert len(outcomes) > 90
    seen = [o for o in outcomes if not o.fault.startswith(UNSEEN) or "q_post_rope" not in lost]
    assert all(o.stage_right for o in seen), table(outcomes)
    assert sum(o.cause_right for o in outcomes) >= 0.94 * len(outcomes), table(outcomes)
    assert not [o.fault for o in outcomes if o.confident_and_wrong], table(outcomes)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Checkpoint]:
    """A model with scores of hundreds, as the first layers of Qwen2.5 have them: softmax makes much of rounding."""
    folder = tmp_path_factory.mktemp("loud")
    raw, weights, _ = Models(folder / "plain").get("qwen2", Planted("", ()))
    weights = {name: w * np.float32(400 if name.endswith("k_proj.bias") else 1) for name, w in weights.items()}
    shutil.copytree(folder / "plain" / "0", folder / "model")
    save_file(weights, folder / "model" / "model.safetensors")
    return raw, weights, open_checkpoint(folder / "model")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("have", [HIDDEN, tuple(name for name in STAGES if name not in FUSED)], ids=["hidden", "fused"])
def test_what_a_softmax_makes_of_rounding_is_no_fault(loud, tmp_path: Path, dtype: str, have: tuple[str, ...]) -> None:
    raw, weights, checkpoint = loud
    trace = run(raw, weights, prompt(23, 272), dtype, {})
    assert max(np.abs(values).max() for key, values in trace.items() if key[1] == "attn_scores") > 200
    write(tmp_path, {key: values for key, values in trace.items() if key[1] in have})
    told = explain(checkpoint, tmp_path, prompt(23, 272), numerics=SHORT[dtype])
    assert told.found.verdict == "clean", sentence(told)


@pytest.mark.parametrize("fault", ["rope_interleaved", "kv_heads_modulo", "mask_strict"])
def test_nor_does_it_hide_the_name_of_one(loud, tmp_path: Path, fault: str) -> None:
    raw, weights, checkpoint = loud
    trace = run(raw, weights, prompt(23, 272), "float32", {fault: None})
    write(tmp_path, {key: values for key, values in trace.items() if key[1] in HIDDEN})
    (cause,) = explain(checkpoint, tmp_path, prompt(23, 272)).causes
    assert cause.stage == "post_attn_residual" and cause.explanation and cause.explanation.hypothesis == fault


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def _one_layer(
    models: Models, folder: Path, arch: str, faults: dict, dtype: str = "float32", tokens: list[int] | None = None
) -> Explained:
    """An engine's dump of layer 2 alone."""
    raw, weights, checkpoint = models.get(arch, Planted("", ()))
    write(folder, run(raw, weights, prompt(23, 272), dtype, faults))
    for path in folder.iterdir():
        if path.name != "layer-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return explain(checkpoint, folder, tokens)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe"])
def test_a_layer_alone_is_not_blamed_for_what_came_in(models: Models, tmp_path: Path, arch: str, dtype: str) -> None:
    told = _one_layer(models, tmp_path / "tree", arch, {"rope_theta/500000": {0}}, dtype, prompt(23, 272))
    assert told.found.verdict == "incomplete" and not told.found.faults, sentence(told)
    assert told.found.unknown == {(2, "post_attn_residual"): TELLS}
    assert _came_in(told) > 0.01  # the wrong theta of layer 0
    assert all(row.inherited for row in told.found.locals if row.key[1] == "attn_norm")


def _came_in(told: Explained) -> float:
    (note,) = (note for note in told.found.notes if "hidden state before layer 2" in note)
    return float(note.split(" from the truth")[0].rsplit(" ", 1)[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_of_a_right_layer_alone_every_stage_is_judged(models: Models, tmp_path: Path, dtype: str) -> None:
    told = _one_layer(models, tmp_path / "tree", "qwen3", {}, dtype, prompt(23, 272))
    assert told.found.verdict == "clean" and not told.found.unknown, sentence(told)
    assert len(told.found.locals) == len(told.found.engine.keys) and _came_in(told) < 0.01


@pytest.mark.parametrize(
    "fault", ["residual_doubled", "residual_missing", "residual_normed", "residual_doubled/branch"]
)
def test_a_layer_alone_is_blamed_for_the_sum_that_tells_its_beginning(
    models: Models, tmp_path: Path, fault: str
) -> None:
    name, *rest = fault.split("/")
    planted = {"/".join([name, "post_attn_residual", *rest]): {2}}
    told = _one_layer(models, tmp_path / "tree", "qwen2", planted, tokens=prompt(23, 272))
    assert [(cause.stage, cause.explanation and cause.explanation.hypothesis) for cause in told.causes] == [
        ("post_attn_residual", name)
    ]


def test_what_came_in_and_the_sum_both_wrong_is_never_clean(models: Models, tmp_path: Path) -> None:
    both = {"rope_theta/500000": {0}, "residual_doubled/post_attn_residual": {2}}
    assert _one_layer(models, tmp_path / "with", "qwen2", both, tokens=prompt(23, 272)).found.verdict != "clean"
    assert _one_layer(models, tmp_path / "without", "qwen2", both).found.verdict != "clean"


def test_a_beginning_that_is_not_finite_is_not_believed(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    _one_layer(models, folder, "qwen2", {})
    for stage in ("post_attn_residual", "attn_out", "attn_norm"):
        path = folder / "layer-2" / f"{stage}.bin"
        path.write_bytes(path.read_bytes()[:12] + b"\x00\x00\xc0\x7f" * 72 + path.read_bytes()[12 + 4 * 72 :])
    checkpoint = models.get("qwen2", Planted("", ()))[2]
    assert "attn_norm" in {fault.stage for fault in explain(checkpoint, folder, prompt(23, 272)).found.faults}


def test_a_layer_alone_tells_its_own_faults_even_without_tokens(models: Models, tmp_path: Path) -> None:
    told = _one_layer(models, tmp_path / "tree", "qwen2", {"norm_weight_missing/attn_norm": {2}, "mask_strict": {2}})
    assert [(cause.stage, cause.explanation and cause.explanation.hypothesis) for cause in told.causes] == [
        ("attn_norm", "norm_weight_missing"),
        ("attn_softmax", "mask_strict"),
    ]


def test_as_many_experts_as_the_engine_has_ids(tmp_path: Path) -> None:
    """Their weights are missing: the right ones are those of as many experts."""
    lost = tuple(name for name in STAGES if name not in (*HIDDEN, "moe_router_indices"))
    names = [name for name in FAULTS if name.startswith("router_count")]
    outcomes = list(sweep(tmp_path, "qwen3_moe", "float32", (LAYER,), names, lost))
    assert outcomes and {stage for o in outcomes for stage in o.found} == {"moe_router_indices"}, table(outcomes)
    assert {c.explanation and c.explanation.hypothesis for o in outcomes for c in o.causes} == {"router_count"}


def test_what_is_no_longer_tried_is_said(models: Models, tmp_path: Path) -> None:
    raw, weights, checkpoint = models.get("qwen2", Planted("", ()))
    trace = run(raw, weights, prompt(23, 272), "float32", {"noise/ffn_up": None})
    write(tmp_path, {key: value for key, value in trace.items() if key[1] in HIDDEN})
    told = explain(checkpoint, tmp_path, prompt(23, 272))
    assert {cause.stage for cause in told.causes} == {"post_ffn_residual"}
    assert [note for note in told.found.notes if note.startswith("post_ffn_residual: what is missing before it")]
    named = run(raw, weights, prompt(23, 272), "float32", {"mask_strict": None})
    write(tmp_path / "named", {key: value for key, value in named.items() if key[1] in HIDDEN})
    notes = explain(checkpoint, tmp_path / "named", prompt(23, 272)).found.notes
    assert not [note for note in notes if "what is missing before it" in note]


def test_a_fault_of_the_first_layer_is_named_without_the_embedding(models: Models, tmp_path: Path) -> None:
    raw, weights, checkpoint = models.get("qwen2", Planted("", ()))
    trace = run(raw, weights, prompt(23, 272), "float32", {"kv_heads_modulo": {0}})
    write(tmp_path, {key: value for key, value in trace.items() if key[1] == "post_ffn_residual"})
    (cause,) = explain(checkpoint, tmp_path, prompt(23, 272)).causes
    assert cause.layers == (0,) and cause.explanation is not None
    assert (cause.explanation.hypothesis, cause.explanation.stages) == ("kv_heads_modulo", ("attn_scores",))


def test_a_pair_is_not_made_of_a_cause_and_of_what_undoes_a_rounding(models: Models, tmp_path: Path) -> None:
    """An eps outside the root changes less than rounding does: beside a rounded input it would turn one value back."""
    raw, weights, checkpoint = models.get("qwen2", Planted("", ()))
    trace = run(raw, weights, prompt(23, 272), "float32", {"input_rounded/down_proj/float16": {LAYER}})
    write(tmp_path, {key: value for key, value in trace.items() if key[1] in HIDDEN})
    named = [cause.explanation and cause.explanation.hypothesis for cause in explain(checkpoint, tmp_path).causes]
    assert set(named) <= {None, "input_rounded", "stored_half"}, named
