"""Engines that read a GGUF with unpacking of their own, as in ggml-quants.c, and misread one part of a block."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from oracle.blocks import PARTS, Blocks
from oracle.explain import explain
from oracle.localize import localize
from oracle.unpacking import MISREADINGS, misreadings
from tests.commands import command
from tests.conftest import prompt
from tests.gguf_writer import tokens as vocabulary
from tests.gguf_writer import write_gguf
from tests.oracle.standin import run, write
from tests.oracle.standin.unpack import FAULTS, SIZES, unpack
from weights import EMBEDDED, Checkpoint, open_checkpoint
from weights.tiny import tiny_config, write_random

TOKENS = prompt(23, 272)
# What each matrix of a layer is read by.
MATRICES = {
    "self_attn.q_proj": "qkv_matmul",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_out",
}
DENSE = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 128}  # rows of several blocks


def a_model(
    folder: Path, kind: str | Callable[[str], str], layers: int, arch: str = "qwen3"
) -> tuple[dict, Checkpoint]:
    experts = {"moe_intermediate_size": 256, "mlp_only_layers": []} if arch == "qwen3_moe" else {}
    raw = tiny_config(arch, None, layers, **DENSE, **experts)
    write_random(folder, raw, seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    names = vocabulary(folder)["tokenizer.ggml.tokens"]
    more = {"tokenizer.ggml.tokens": [*names[:-1], "ab"], "tokenizer.ggml.merges": ["a b"]}
    write_gguf(folder, folder / "model.gguf", kind, more)
    return raw, open_checkpoint(folder / "model.gguf")


def random_rows(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (4, 5, SIZES[kind][1]), dtype=np.uint8)
    for name in ("d", "dmin"):
        if name in PARTS[kind]:  # about half of them below the smallest normal number
            data[..., PARTS[kind][name]] = rng.uniform(2e-5, 1e-4, (4, 5, 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":  # powers of two
        data[..., 0] = rng.integers(120, 128, (4, 5))
    return data.reshape(4, -1)


@pytest.mark.parametrize("kind", SIZES)
def test_what_the_table_reads_is_what_loops_read(kind: str) -> None:
    data = random_rows(kind)
    right = quants.dequantize(data, GGMLQuantizationType[kind])
    np.testing.assert_allclose(unpack(kind, data), right, rtol=2e-7, atol=0)  # d·q + m may be rounded twice
    rows = {row.name: row for row in misreadings(kind)}
    for fault in FAULTS[kind]:
        wrong = unpack(kind, data, fault).astype(np.float64)
        assert np.abs(wrong - right).max() > 0.01 * np.abs(right).mean(), fault
        read = rows[fault].read(Blocks.of(kind, data))
        assert np.linalg.norm(read - wrong) <= 1e-6 * np.linalg.norm(wrong), fault


def test_every_row_of_the_table_is_planted() -> None:
    assert [row for row in MISREADINGS if not any(row.name in FAULTS[kind] for kind in row.kinds)] == []
    assert {fault for faults in FAULTS.values() for fault in faults} <= {row.name for row in MISREADINGS}


def wrongly(kind: str, checkpoint: Checkpoint, name: str, faults: deque[str]) -> tuple[str, dict[str, np.ndarray]]:
    """The next fault that changes a matrix, and that matrix; q, k and v share one."""
    names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"] if "q_proj" in name else [name]
    for _ in range(len(faults)):
        fault = faults[0]
        faults.rotate(-1)
        if fault == "d as bfloat16":
            continue  # next to nothing, behind which no other fault shows
        found = {each: unpack(kind, checkpoint.packed(each, slice(None)), fault) for each in names}
        if not any(np.array_equal(values, checkpoint.tensor(each)) for each, values in found.items()):
            return fault, found
    raise AssertionError(f"{kind}: no fault changes {name}")


@pytest.mark.parametrize(
    ("kind", "layers"),
    [(kind, 1 + (kind in ("Q4_K", "Q6_K"))) for kind in SIZES if kind not in ("Q4_1", "IQ4_NL", "MXFP4")],
)
def test_each_matrix_has_its_own_misreading(kind: str, layers: int, tmp_path: Path) -> None:
    raw, checkpoint = a_model(tmp_path / "model", kind, layers)
    weights = {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.tensor_names}
    faults, planted = deque(FAULTS[kind]), {}
    places = {f"model.layers.{i}.{name}.weight": (i, stage) for i in range(layers) for name, stage in MATRICES.items()}
    places |= {"model.embed_tokens.weight": (0, "embedding"), "lm_head.weight": (None, "lm_head")}
    for name, key in places.items():
        planted[key], wrong = wrongly(kind, checkpoint, name, faults)
        weights |= wrong
    write(tmp_path / "tree", run(raw, weights, TOKENS))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    named = {(layer, c.stage): c.explanation for c in told.causes for layer in c.layers}
    assert named.keys() == planted.keys()
    for key, fault in planted.items():
        explanation = named[key]
        assert explanation is not None, (key, fault)
        assert "weight_unpacked" in (explanation.hypothesis, *explanation.same), (key, fault)
        if explanation.hypothesis == "weight_unpacked":  # numbers with one scale may be said to be in another order
            assert explanation.parameter == f"{kind}: {fault}", key
            assert explanation.text.startswith(f"blocks of {kind}: ")
        else:
            assert explanation.hypothesis == "weight_nibbles" and kind in ("Q4_0", "IQ4_XS")


def misread(checkpoint: Checkpoint, kind: str, fault: str) -> dict[str, np.ndarray]:
    """The tensors as an engine has them that misreads one type."""
    return {
        name: unpack(kind, checkpoint.packed(name, slice(None)), fault)
        if checkpoint.stored_as(name) == kind
        else np.array(checkpoint.tensor(name), np.float32)
        for name in checkpoint.tensor_names
    }


def q4_k_m(name: str) -> str:
    """Two types in one file, as llama.cpp's mixtures have them."""
    return "Q6_K" if "attn_v" in name or name == "output.weight" or name == "blk.1.ffn_down.weight" else "Q4_K"


@pytest.mark.parametrize(
    ("fault", "dtype", "words"),
    [
        ("scales unsigned", "float32", "scales are read as unsigned bytes"),
        ("scales of 32", "float16", "each 32 numbers have one scale of two"),
    ],
)
def test_one_type_of_several_is_told(fault: str, dtype: str, words: str, tmp_path: Path) -> None:
    raw, checkpoint = a_model(tmp_path / "model", q4_k_m, 2)
    write(tmp_path / "tree", run(raw, misread(checkpoint, "Q6_K", fault), TOKENS, dtype))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    named = {(layer, c.stage): c.explanation and c.explanation.parameter for c in told.causes for layer in c.layers}
    wrong = [(0, "qkv_matmul"), (1, "qkv_matmul"), (1, "ffn_out"), (None, "lm_head")]
    assert named == dict.fromkeys(wrong, f"Q6_K: {fault}")
    said = [c.explanation.text for c in told.causes if c.explanation and c.stage == "qkv_matmul"]
    assert said == [f"blocks of Q6_K of v_proj: {words}"]
    note = "the 4 products that read weights in Q6_K are all wrong, and the 7 others are right"
    assert any(words.startswith(note) for words in told.found.notes)


def test_one_type_is_not_told_where_another_is_wrong_too(tmp_path: Path) -> None:
    raw, checkpoint = a_model(tmp_path / "model", q4_k_m, 2)
    weights = misread(checkpoint, "Q6_K", "scales unsigned")
    weights["model.layers.0.mlp.up_proj.weight"] *= np.float32(1.1)
    write(tmp_path / "tree", run(raw, weights, TOKENS))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    assert not any("products that read weights in" in words for words in told.found.notes)
    named = {(layer, c.stage): c.explanation and c.explanation.hypothesis for c in told.causes for layer in c.layers}
    assert named[0, "ffn_up"] == "scaled" and named[1, "ffn_out"] == "weight_unpacked"


def test_one_stage_is_not_taken_for_its_type(tmp_path: Path) -> None:
    """Routers alone are F32 in these files; what is wrong with them has nothing to do with that."""
    raw, checkpoint = a_model(tmp_path / "model", "Q4_0", 2, "qwen3_moe")
    weights = {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.tensor_names}
    routers = [name for name in weights if name.endswith("mlp.gate.weight")]
    assert {checkpoint.stored_as(name) for name in routers} == {"F32"}
    weights |= {name: weights[name] * np.float32(1.25) for name in routers}
    write(tmp_path / "tree", run(raw, weights, TOKENS))
    found = localize(checkpoint, tmp_path / "tree", TOKENS, numerics="f32")
    assert {fault.stage for fault in found.faults} == {"moe_router_logits"}
    assert not any("products that read weights in" in words for words in found.notes)


def test_experts_are_misread_too(tmp_path: Path) -> None:
    raw, checkpoint = a_model(tmp_path / "model", "Q4_K", 1, "qwen3_moe")
    weights = misread(checkpoint, "Q4_K", "mins missing")
    experts = {name: weights[name] if ".experts." in name else np.array(checkpoint.tensor(name)) for name in weights}
    write(tmp_path / "tree", run(raw, experts, TOKENS))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    named = {c.stage: c.explanation and c.explanation.parameter for c in told.causes}
    assert named == dict.fromkeys(("moe_expert_gate", "moe_expert_up", "moe_expert_out"), "Q4_K: mins missing")


def test_what_is_next_to_nothing_is_named(tmp_path: Path) -> None:
    raw, checkpoint = a_model(tmp_path / "model", "Q8_0", 1)
    weights = {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.tensor_names}
    weights["lm_head.weight"] = misread(checkpoint, "Q8_0", "d as bfloat16")["lm_head.weight"]
    write(tmp_path / "tree", run(raw, weights, TOKENS))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    named = {c.stage: c.explanation and c.explanation.parameter for c in told.causes}
    assert named == {"lm_head": "Q8_0: d as bfloat16"}


def test_random_bytes_are_given_no_name(tmp_path: Path) -> None:
    """An engine that reads blocks in a way that nobody thought of."""
    raw, checkpoint = a_model(tmp_path / "model", "Q4_K", 1)
    weights = {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.tensor_names}
    name = "model.layers.0.mlp.down_proj.weight"
    data = checkpoint.packed(name, slice(None)).copy()
    blocks = data.reshape(-1, SIZES["Q4_K"][1])
    blocks[:, PARTS["Q4_K"]["qs"]] = np.random.default_rng(1).permuted(blocks[:, PARTS["Q4_K"]["qs"]], axis=1)
    weights[name] = unpack("Q4_K", data)
    write(tmp_path / "tree", run(raw, weights, TOKENS))
    told = explain(checkpoint, tmp_path / "tree", TOKENS)
    assert [(c.stage, c.explanation) for c in told.causes] == [("ffn_out", None)]


def test_it_can_be_planted(tmp_path: Path) -> None:
    _, checkpoint = a_model(tmp_path / "model", "Q5_0", 2)
    words = (
        "--tokens",
        ",".join(map(str, TOKENS)),
        "--fault",
        "weight_unpacked",
        "--at",
        "1",
        "--output",
        tmp_path / "t",
    )
    done = command("plant", tmp_path / "model" / "model.gguf", *words, module="oracle")
    assert done.returncode == 0, done.stderr
    told = explain(checkpoint, tmp_path / "t")
    named = {(layer, c.stage): c.explanation and c.explanation.parameter for c in told.causes for layer in c.layers}
    assert named.keys() == {(1, stage) for stage in MATRICES.values()} | {(None, "lm_head")}
    assert set(named.values()) == {"Q5_0: runs of 1"}
