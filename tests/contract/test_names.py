"""ATTN-SUB-001 and ATTN-SUB-002: the engine's stage names, their order, and what two of them write."""

from __future__ import annotations

import pytest

from jaxref.selection import parse_layers, parse_stages
from jaxref.stages import ALIASES, STAGES, stage_named
from tests.conftest import PROMPT
from tests.trees import read_tree, write_tree
from weights import UserError, config_from_dict
from weights.tiny import tiny_config

# From the stage contract, in computation order.
CANONICAL = (
    "embedding attn_norm qkv_matmul qkv_bias q_post_rope k_post_rope attn_scores attn_softmax attention attn_out"
    " post_attn_residual ffn_norm ffn_gate ffn_up ffn_silu ffn_swigl ffn_out post_ffn_residual final_norm lm_head"
).split()
CHAIN = "attn_norm,qkv_matmul,qkv_bias,q_post_rope,k_post_rope,attn_scores,attn_softmax,attention,attn_out"
QWEN2, QWEN3 = (config_from_dict(tiny_config(arch)) for arch in ("qwen2", "qwen3"))


def test_attn_sub_001_canonical_names_exist_in_computation_order() -> None:
    ours = [name for name, stage in STAGES.items() if stage.canonical]
    assert [name for name in ours if name in CANONICAL] == CANONICAL


@pytest.mark.parametrize("name", CANONICAL)
def test_attn_sub_001_each_name_parses_back_from_any_case(name: str) -> None:
    for written in (name, name.upper(), name.title(), f"  {name} "):
        assert stage_named(written).name == name


def test_attn_sub_001_the_attention_chain_parses_as_one_list() -> None:
    assert parse_stages(CHAIN, QWEN2) == tuple(CHAIN.split(","))
    assert parse_stages(CHAIN.upper().replace(",", " , "), QWEN2) == tuple(CHAIN.split(","))


def test_attn_sub_001_older_names_kept_their_meaning() -> None:
    assert {old: stage_named(old).name for old in ALIASES} == {"layer_output": "post_ffn_residual"}


def test_attn_sub_002_two_stages_of_one_layer_are_two_files(zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path, list(PROMPT), stages="attn_scores,attn_softmax", layers="0..1")
    files = read_tree(tmp_path)
    assert sorted(files) == ["layer-0/attn_scores.bin", "layer-0/attn_softmax.bin"]
    assert {values.size for values in files.values()} == {6 * 7 * 7}


def test_attn_sub_002_the_four_sub_stages_come_in_order() -> None:
    four = ("q_post_rope", "k_post_rope", "attn_scores", "attn_softmax")
    assert parse_stages(",".join(reversed(four)), QWEN2) == four


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_nrom", "unknown stage 'attn_nrom'; stages are embedding, attn_norm"),
        ("attn_norm,,lm_head", "empty name"),
        ("", "empty name"),
        ("qkv_bias", "qwen3 has no stage qkv_bias; it has embedding"),
    ],
)
def test_a_wrong_stage_is_named(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_stages(text, QWEN3)


@pytest.mark.parametrize(("text", "layers"), [("all", (0, 1, 2, 3)), ("1..3", (1, 2)), ("3, 0", (0, 3)), ("2", (2,))])
def test_layers_as_people_type_them(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["3..3", "3..1", "-1", "4", "0..5", "1,9", "x", "", "1..", "0..99999999999999", "1.5"])
def test_impossible_layers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="layers"):
        parse_layers(text, 4)
