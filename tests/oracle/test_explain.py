"""Localize and explain against an engine that somebody else wrote, with every fault of its catalogue planted."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from oracle.bench import Bench
from oracle.case import Case
from oracle.explain import Explained, explain
from oracle.hypotheses import HYPOTHESES
from oracle.local import NO_TOKENS
from oracle.localize import localize
from oracle.replay import Replay
from oracle.told import sentence
from tests.conftest import prompt
from tests.oracle.standin import FAULTS, Planted, run, struck_stages, write
from tests.oracle.sweep import LAYER, LAYERS, Models, Outcome, sweep, table
from tests.trees import distance, write_tree
from weights import EMBEDDED, open_checkpoint

ARCHS = ("qwen2", "qwen3", "qwen3_moe")
TOKENS = prompt(23, 272)
CLEAN = Planted("", ())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def told(models: Models, folder: Path, arch: str, faults: dict, dtype: str = "float32", **options) -> Explained:
    raw, weights, checkpoint = models.get(arch, CLEAN)
    tokens = options.pop("given", TOKENS)
    write(folder, run(raw, weights, TOKENS, dtype, faults), last=options.pop("last", False))
    return explain(checkpoint, folder, tokens, **options)


@pytest.mark.parametrize(
    ("arch", "dtype", "layers"),
    [
        *((arch, dtype, LAYERS[arch]) for arch in ARCHS for dtype in ("float32", "float16")),
        ("qwen2", "float32", None),
        ("qwen3_moe", "float16", None),
    ],
)
def test_every_fault_of_the_catalogue(tmp_path: Path, arch: str, dtype: str, layers: tuple[int, ...] | None) -> None:
    outcomes: list[Outcome] = list(sweep(tmp_path, arch, dtype, layers))
    print(table(outcomes))
    assert len(outcomes) > 130
    assert {o.fault for o in outcomes} == {p.name for p in FAULTS.values() if arch in p.archs and dtype in p.dtypes}
    assert all(o.stage_right for o in outcomes), table(outcomes)
    # In float16 one GELU is another inside an expert.
    least = len(outcomes) - (2 if (arch, dtype) == ("qwen3_moe", "float16") else 0)
    assert sum(o.cause_right for o in outcomes) >= least, table(outcomes)
    assert not [o.fault for o in outcomes if o.confident_and_wrong], table(outcomes)


@pytest.mark.parametrize("count", [7, 60])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_clean_engine_has_no_fault(models: Models, tmp_path: Path, arch: str, dtype: str, count: int) -> None:
    raw, weights, checkpoint = models.get(arch, CLEAN)
    tokens = prompt(count, 272)
    write(tmp_path, run(raw, weights, tokens, dtype))
    found = localize(checkpoint, tmp_path, tokens)  # its numerics are guessed
    assert found.numerics == dtype
    assert found.verdict == "clean", sentence(Explained(found))
    assert len(found.locals) == len(found.engine.keys)


def test_two_faults_at_once(models: Models, tmp_path: Path) -> None:
    chance, right, total = random.Random(1), 0, 0
    for arch in ARCHS:
        rows = [p for p in FAULTS.values() if arch in p.archs and not p.config and p.per_layer and p.cause]
        rows = [p for p in rows if p.weights == "float32"]
        for first, second in chance.sample(list(itertools.combinations(rows, 2)), 12):
            raw, weights, checkpoint = models.get(arch, CLEAN)
            try:
                trace = run(raw, weights, TOKENS, "float32", {first.name: {LAYER}, second.name: {LAYER}})
            except ValueError:  # one of them takes away what the other one changes
                continue
            folder = tmp_path / f"{arch}-{total}"
            write(folder, trace)
            found = localize(checkpoint, folder, TOKENS)
            struck = {key for p in (first, second) for key in struck_stages(p, trace, LAYER)}
            right += struck == {row.key for row in found.locals if row.faulty}
            total += 1
    assert total >= 30 and right >= 0.95 * total


def test_two_faults_of_one_stage_are_named_together(models: Models, tmp_path: Path) -> None:
    result = told(models, tmp_path, "qwen2", {"rope_positions/1": None, "rope_theta/500000": None})
    causes = [cause for cause in result.causes if cause.stage == "q_post_rope"]
    assert [set(str(c.explanation and c.explanation.hypothesis).split("+")) for c in causes] == [
        {"rope_theta", "rope_positions"}
    ]


@pytest.mark.parametrize("offset", [1, -1, 17])
def test_a_decode_step_at_the_wrong_position_is_named(models: Models, tmp_path: Path, offset: int) -> None:
    raw, weights, checkpoint = models.get("qwen2", CLEAN)
    trace = run(raw, weights, TOKENS, "float32", {f"rope_positions/{offset}": {LAYER}})
    by_head = ("attn_scores", "attn_softmax")
    write(tmp_path, {key: x[:, -1:] if key[1] in by_head else x[-1:] for key, x in trace.items()})
    named = {
        cause.stage: (cause.explanation.hypothesis, cause.explanation.parameter)
        for cause in explain(checkpoint, tmp_path, TOKENS).causes
        if cause.explanation is not None
    }
    assert named == {"q_post_rope": ("rope_positions", offset), "k_post_rope": ("rope_positions", offset)}


def test_one_head_one_percent_off_is_found_and_named(models: Models, tmp_path: Path) -> None:
    result = told(models, tmp_path, "qwen2", {"head_scaled/attention": {1}})
    (fault,) = result.found.faults
    assert (fault.stage, fault.layers, fault.spared) == ("attention", (1,), (0, 2, 3))
    assert fault.worst.where["heads_wrong"] == 1
    (cause,) = result.causes
    assert cause.explanation is None
    assert f"head {fault.worst.where['head']} alone" in cause.hint and "a scale of 1.01" in cause.hint


def test_stages_that_are_missing_are_computed_and_named(models: Models, tmp_path: Path) -> None:
    raw, weights, checkpoint = models.get("qwen2", CLEAN)
    write(tmp_path, run(raw, weights, TOKENS, "float32", {"gelu_tanh": {2}}))
    for stage in ("ffn_silu", "qkv_bias", "attn_softmax", "post_ffn_residual"):
        for path in tmp_path.glob(f"layer-*/{stage}.bin"):
            path.unlink()
    found = localize(checkpoint, tmp_path, TOKENS)
    assert [(fault.stage, fault.layers) for fault in found.faults] == [("ffn_swigl", (2,))]
    assert "layer-2/ffn_silu" in found.faults[0].worst.through
    assert not found.unknown


def test_a_tree_of_one_layer_begins_at_the_tokens(models: Models, tmp_path: Path) -> None:
    raw, weights, checkpoint = models.get("qwen3", CLEAN)
    write(tmp_path, run(raw, weights, TOKENS, "float32"))
    for layer in (0, 1, 3):
        shutil.rmtree(tmp_path / f"layer-{layer}")
    (tmp_path / "layer-2" / "attn_out.bin").unlink()  # with it the layer would tell what it began with
    found = localize(checkpoint, tmp_path, TOKENS)
    assert found.verdict == "clean"
    assert any("layer-1/post_ffn_residual" in row.through for row in found.locals)
    without = localize(checkpoint, tmp_path)
    assert without.verdict == "clean" and without.unknown[2, "attn_norm"] == NO_TOKENS


def test_without_tokens_all_but_the_embedding_is_replayed(models: Models, tmp_path: Path) -> None:
    result = told(models, tmp_path, "qwen2", {"bias_missing": None}, given=None)
    assert {fault.stage for fault in result.found.faults} == {"qkv_bias"}
    assert result.found.unknown == {(0, "embedding"): NO_TOKENS}
    assert all(row.accumulated is None for row in result.found.locals)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_position_alone_of_experts_and_logits(models: Models, tmp_path: Path, arch: str) -> None:
    clean = told(models, tmp_path / "clean", arch, {}, last=True)
    assert clean.found.verdict == "clean"
    fault = told(models, tmp_path / "fault", arch, {"logits_scaled/0.5": None}, last=True)
    assert [f.stage for f in fault.found.faults] == ["lm_head"]


def test_the_variants_without_switches_are_the_stages(models: Models, tmp_path: Path) -> None:
    """Each function of `variants.py` against the stage of `jaxref` that it repeats, on real inputs."""
    seen: set[str] = set()

    def visit(replay: Replay, case: Case, row, engine: np.ndarray) -> None:
        if case.stage != "moe_router_indices":
            assert distance(Bench(replay, case, engine).run({}), replay.exact(case)) < 1e-12
            seen.add(case.stage)

    for arch in ARCHS:
        raw, weights, checkpoint = models.get(arch, CLEAN)
        trace = run(raw, weights, TOKENS, "float32")
        # Everything is faulty, so that everything is visited.
        write(tmp_path / arch, {key: value if "indices" in key[1] else 1.5 * value + 1 for key, value in trace.items()})
        localize(checkpoint, tmp_path / arch, TOKENS, visit=visit)
        assert {key[1] for key in trace} - {"moe_router_indices"} <= seen
    assert {stage for row in HYPOTHESES for stage in row.stages} <= seen


def test_jaxrefs_own_dump_is_clean_in_every_dtype(tmp_path: Path) -> None:
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        write_tree(EMBEDDED, tmp_path / dtype, TOKENS, dtype=dtype)
        found = localize(open_checkpoint(EMBEDDED), tmp_path / dtype)
        assert found.verdict == "clean" and found.engine.tokens == TOKENS


def test_a_yardstick_raises_the_floor(models: Models, tmp_path: Path) -> None:
    """What another program of the same numerics does nearly as badly is no fault; more than that is one."""
    raw, weights, checkpoint = models.get("qwen2", CLEAN)
    trace = run(raw, weights, TOKENS, "float32")
    right, key = np.asarray(trace[None, "lm_head"], np.float64), (None, "lm_head")
    write(tmp_path / "clean", trace)
    (floor,) = (row.floor for row in localize(checkpoint, tmp_path / "clean", TOKENS).locals if row.key == key)
    noise = np.random.default_rng(0).normal(size=right.shape)
    noise *= floor * np.linalg.norm(right) / np.linalg.norm(noise)
    for times in (3, 6, 20):
        write(tmp_path / f"{times}", trace | {key: (right + times * noise).astype(np.float32)})
    for times, verdict in ((3, "clean"), (6, "faulty"), (20, "faulty")):
        assert localize(checkpoint, tmp_path / f"{times}", TOKENS).verdict == verdict
    for times, verdict in ((6, "clean"), (20, "faulty")):
        assert localize(checkpoint, tmp_path / f"{times}", TOKENS, hf=tmp_path / "3").verdict == verdict
