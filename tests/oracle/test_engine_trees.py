"""The first consumer's trees, by the conventions on record: `apr trace --save-tensor` and its Hugging Face script.

Made here value by value and byte by byte from the stage contract, and read by `compare` without an option.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

import jaxref
from oracle import compare
from oracle.report import as_text
from tests.conftest import prompt
from tests.trees import write_tree
from weights import Config, open_checkpoint

TOKENS = prompt(12, 272)
LAST_ONLY = ("lm_head", "moe_router", "moe_router_indices", "moe_ffn_out")
# The engine's 23 names; extensions of ours it does not have.
EXTENSIONS = ("q_norm", "k_norm", "moe_router_logits", "moe_expert")


def put(folder: Path, layer: int | None, stage: str, values: np.ndarray) -> None:
    """12 bytes and floats, as the contract has them."""
    path = folder / f"{stage}.bin" if layer is None else folder / f"layer-{layer}" / f"{stage}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer is None else layer, values.size)
    path.write_bytes(head + np.ascontiguousarray(values, "<f4").tobytes())


def trace_of(folder: Path, dtype: str) -> tuple[dict, Config]:
    checkpoint = open_checkpoint(folder)
    return jaxref.forward(checkpoint.params(), np.asarray(TOKENS), checkpoint.config, dtype), checkpoint.config


def stages_in(trace: dict):
    for key, value in trace.items():
        if isinstance(value, dict):
            for stage, array in value.items():
                yield int(key.removeprefix("layer-")), stage, np.asarray(array, np.float32)
        else:
            yield None, key, np.asarray(value, np.float32)


def as_apr(folder: Path, out: Path, dtype: str, change=None) -> None:
    """Zeros above the diagonal of the scores, the last position of MoE stages and of the head, no manifest."""
    trace, _ = trace_of(folder, dtype)
    for layer, stage, values in stages_in(trace):
        if stage.startswith(EXTENSIONS):
            continue
        values = np.tril(values) if stage == "attn_scores" else values
        values = values[-1:] if stage in LAST_ONLY else values
        put(out, layer, stage, values if change is None else change(layer, stage, values))


def as_hf_script(folder: Path, out: Path, dtype: str) -> None:
    """Head-major q and k, raw scores everywhere, no post_attn_residual, no manifest."""
    trace, config = trace_of(folder, dtype)
    for layer, stage, values in stages_in(trace):
        if stage == "post_attn_residual" or stage.startswith(EXTENSIONS):
            continue
        if stage in ("q_post_rope", "k_post_rope"):
            values = values.reshape(len(TOKENS), -1, config.head_dim).transpose(1, 0, 2)
        put(out, layer, stage, values[-1:] if stage in LAST_ONLY else values)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "moe"])
def model(request: pytest.FixtureRequest, zoo, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its reference tree."""
    reference = tmp_path_factory.mktemp("reference") / "tree"
    write_tree(zoo(request.param), reference, TOKENS, positions="all")
    return zoo(request.param), reference


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_clean_tree_of_the_engine_is_clean(model, tmp_path: Path, dtype: str) -> None:
    folder, reference = model
    as_apr(folder, tmp_path, dtype)
    result = compare(reference, tmp_path)
    assert result.exit_code == 0, as_text(result)


def test_a_clean_tree_of_its_hugging_face_script_differs_in_layout_alone(model, tmp_path: Path) -> None:
    folder, reference = model
    as_hf_script(folder, tmp_path, "float32")
    result = compare(reference, tmp_path)
    assert result.exit_code == 0, as_text(result)
    assert "head-major" in as_text(result)
    assert {skip.key[1] for skip in result.skips} >= {"post_attn_residual"}


def test_a_fault_above_the_diagonal_is_none_and_below_it_is_one(model, tmp_path: Path) -> None:
    folder, reference = model

    def spoil(layer: int | None, stage: str, values: np.ndarray) -> np.ndarray:
        if (layer, stage) == (1, "attn_scores"):
            values = values.copy()
            values[2, 9, 4] += 1.0
        return values

    as_apr(folder, tmp_path / "spoiled", "float32", spoil)
    result = compare(reference, tmp_path / "spoiled")
    assert result.exit_code == 1
    assert result.first is not None
    assert result.first.key == (1, "attn_scores")


def test_another_missing_stage_is_still_missed(model, tmp_path: Path) -> None:
    folder, reference = model
    as_apr(folder, tmp_path, "float32")
    for path in tmp_path.glob("layer-*/attn_out.bin"):
        path.unlink()
    assert compare(reference, tmp_path).exit_code == 2


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_apr_convention_of_the_dump_has_the_bytes_of_the_engine(zoo, tmp_path: Path, name: str) -> None:
    as_apr(zoo(name), tmp_path / "engine", "float32")
    write_tree(zoo(name), tmp_path / "dump", TOKENS, convention="apr")
    for path in (tmp_path / "engine").rglob("*.bin"):
        if "moe_ffn_out" in path.name or "lm_head" in path.name:
            continue  # computed for one row alone there, for all rows here
        assert path.read_bytes() == (tmp_path / "dump" / path.relative_to(tmp_path / "engine")).read_bytes(), path
