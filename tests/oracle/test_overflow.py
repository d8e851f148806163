"""Numbers that leave a type's range on the way: what is NaN, infinite or zero then has a name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oracle.explain import Explained, explain
from tests.commands import command
from tests.conftest import prompt
from tests.oracle.standin import run, write
from tests.oracle.standin.planted import Planted
from tests.oracle.sweep import SHORT, Models
from weights import Checkpoint, open_checkpoint

Model = tuple[dict, dict, Checkpoint]
# Scores of hundreds and gates beyond 88, as Qwen2.5 has them.
LOUD = {"k_norm.weight": 100, "gate_proj.weight": 40}
COUNT = 23


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """By architecture and how many times as large the embedding is, and the biases of keys.

    By 130 the squares of some hidden states sum up to more than 65504, by 900 some values are above 256.
    """
    root, made = tmp_path_factory.mktemp("loud"), dict[Path, Model]()

    def get(arch: str, factor: int, keys: int = 400) -> Model:
        folder = root / f"{arch}-{factor}-{keys}"
        if folder not in made:
            raw, weights, _ = Models(folder / "plain").get(arch, Planted("", ()))
            loud = LOUD | {"embed_tokens.weight": factor, "k_proj.bias": keys}
            times = {name: next((f for end, f in loud.items() if name.endswith(end)), 1) for name in weights}
            weights = {name: w * np.float32(times[name]) for name, w in weights.items()}
            shutil.copytree(folder / "plain" / "0", folder / "loud")
            save_file(weights, folder / "loud" / "model.safetensors")
            made[folder] = raw, weights, open_checkpoint(folder / "loud")
        return made[folder]

    return get


def explained(model: Model, folder: Path, fault: str, dtype: str) -> tuple[Explained, dict]:
    raw, weights, checkpoint = model
    trace = run(raw, weights, prompt(COUNT, 272), dtype, {fault: {2}} if fault else {})
    write(folder, trace)
    return explain(checkpoint, folder, prompt(COUNT, 272), numerics=SHORT[dtype]), trace


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    ("fault", "parameter", "stages"),
    [
        ("softmax_overflow/float32", "float32", {"attn_softmax"}),
        ("softmax_overflow/float16", "float16", {"attn_softmax"}),
        ("silu_overflow/float32", "float32", {"ffn_silu", "moe_expert_swigl"}),
        ("silu_overflow/float16", "float16", {"ffn_silu", "moe_expert_swigl"}),
        ("norm_overflow/attn_norm/each", "each", {"attn_norm"}),
        ("norm_overflow/ffn_norm/sum", "sum", {"ffn_norm"}),
    ],
)
def test_what_overflows_is_named(
    model: Callable[..., Model], tmp_path: Path, arch: str, dtype: str, fault: str, parameter: str, stages: set[str]
) -> None:
    factor = 900 if parameter == "each" else 130
    told, _ = explained(model(arch, factor), tmp_path / "tree", fault, dtype)
    found = {c.stage: c.explanation and (c.explanation.hypothesis, c.explanation.parameter) for c in told.causes}
    assert found.keys() <= stages and set(found.values()) == {(fault.partition("/")[0], parameter)}, told.causes


def test_products_that_overflow_before_they_are_scaled_are_named(model: Callable[..., Model], tmp_path: Path) -> None:
    told, trace = explained(model("qwen2", 130, keys=12000), tmp_path / "tree", "scores_overflow", "float32")
    assert np.isinf(trace[2, "attn_scores"]).any() and np.isfinite(trace[1, "attn_scores"]).all()
    (cause,) = told.causes
    assert cause.stage == "attn_scores" and cause.explanation and cause.explanation.hypothesis == "scores_overflow"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_nan_more_has_no_name(model: Callable[..., Model], tmp_path: Path, dtype: str) -> None:
    raw, weights, checkpoint = model("qwen2", 130)
    trace = run(raw, weights, prompt(COUNT, 272), dtype, {"softmax_overflow/float32": {2}})
    trace[2, "attn_softmax"][3, 20, 4] = np.nan
    write(tmp_path / "tree", {key: values for key, values in trace.items() if key[0] == 2 or key[1] == "embedding"})
    told = explain(checkpoint, tmp_path / "tree", prompt(COUNT, 272), numerics=SHORT[dtype])
    assert [(cause.stage, cause.explanation) for cause in told.causes][:1] == [("attn_softmax", None)]


def test_what_is_not_finite_can_be_planted(model: Callable[..., Model], tmp_path: Path) -> None:
    _, _, checkpoint = model("qwen3", 130)
    tokens = prompt(COUNT, 272)
    words = ("--tokens", ",".join(map(str, tokens)), "--fault", "softmax_overflow", "--at", "1", "--quiet")
    done = command("plant", checkpoint.folder, *words, "--output", tmp_path / "tree", module="oracle")
    assert done.returncode == 0, done.stderr
    causes = explain(checkpoint, tmp_path / "tree", tokens).causes
    assert [(c.stage, c.layers, c.explanation and c.explanation.hypothesis) for c in causes] == [
        ("attn_softmax", (1,), "softmax_overflow")
    ]
