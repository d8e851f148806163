"""MOE-SUB-001, -002, QW3-MOE-FORWARD-004, QW3-MOE-GPU-INVARIANTS and -DETERMINISM (here on the CPU)."""

from __future__ import annotations

import numpy as np
import pytest

from jaxref.selection import parse_stages
from jaxref.stages import STAGES, stage_named
from tests.conftest import prompt
from tests.trees import read_tree, tree_bytes, write_tree
from weights import config_from_dict, open_checkpoint
from weights.tiny import tiny_config

MOE = (
    "moe_router_logits moe_router moe_router_indices moe_expert_gate moe_expert_up moe_expert_swigl moe_expert_out"
    " moe_ffn_out"
).split()
CANONICAL = {"moe_router", "moe_router_indices", "moe_ffn_out"}
TOKENS = prompt(20, 272)


def test_moe_sub_001_names_parse_in_computation_order() -> None:
    config = config_from_dict(tiny_config("qwen3_moe"))
    assert parse_stages(",".join(reversed(MOE)).upper(), config) == tuple(MOE)
    assert [name for name in STAGES if name.startswith("moe_")] == MOE
    assert {name for name in MOE if stage_named(name).canonical} == CANONICAL
    # The engine's 23 names: 20 of dense models and these three.
    assert sum(stage.canonical for stage in STAGES.values()) == 23


def test_moe_sub_002_dense_stages_keep_their_bytes(zoo, tmp_path) -> None:
    dense = "attn_norm,attn_out,ffn_norm,post_ffn_residual"
    write_tree(zoo("moe"), tmp_path / "dense", TOKENS, stages=dense)
    write_tree(zoo("moe"), tmp_path / "both", TOKENS, stages=f"{dense},{','.join(MOE)}")
    both = tree_bytes(tmp_path / "both")
    assert {path: both[path] for path in tree_bytes(tmp_path / "dense")} == tree_bytes(tmp_path / "dense")
    assert len(both) > len(tree_bytes(tmp_path / "dense"))


@pytest.mark.parametrize("name", ["moe", "moe-64"])
def test_qw3_moe_forward_004_logits_against_hugging_face_float16(zoo, tmp_path, name: str) -> None:
    hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
    write_tree(zoo(name), tmp_path, TOKENS, stages="lm_head")
    ours = read_tree(tmp_path)["lm_head.bin"].astype(np.float64)
    theirs = hf.capture(hf.load(zoo(name), "float16"), TOKENS)["lm_head"][-1].astype(np.float64)
    assert ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)) >= 0.99
    assert ours.argmax() == theirs.argmax()


@pytest.mark.parametrize("name", ["moe", "moe-64", "moe-sparse"])
def test_qw3_moe_gpu_invariants(zoo, tmp_path, name: str) -> None:
    config = open_checkpoint(zoo(name)).config
    write_tree(zoo(name), tmp_path, TOKENS, positions="all")
    for path, values in read_tree(tmp_path).items():
        stage = STAGES[path.split("/")[-1].removesuffix(".bin")]
        values = values.reshape(stage.shape(config, len(TOKENS)))
        assert np.isfinite(values).all(), path
        if stage.name == "moe_router":
            assert (np.diff(values, axis=-1) <= 0).all()
            if config.norm_topk_prob:
                np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-6)
        if stage.name == "moe_router_indices":
            assert all(len(set(row)) == len(row) for row in values.tolist())


def test_qw3_moe_gpu_determinism(zoo, tmp_path) -> None:
    for run in ("a", "b"):
        write_tree(zoo("moe-64"), tmp_path / run, TOKENS, positions="all")
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_only_the_chosen_experts_are_read(zoo, tmp_path) -> None:
    checkpoint = open_checkpoint(zoo("moe-64"))
    report = write_tree(zoo("moe-64"), tmp_path, [7], stages="post_ffn_residual", layers="0")
    config = checkpoint.config
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    plain = sum(int(np.prod(checkpoint.shape(n))) for n in checkpoint.tensor_names if n.startswith("model.layers.0."))
    plain = 4 * plain - config.num_experts * expert
    assert report.read == 4 * config.hidden_size + plain + config.num_experts_per_tok * expert
