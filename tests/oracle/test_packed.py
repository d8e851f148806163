"""An engine that reads weights with its own unpacking, or as another type, and gets it wrong everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from oracle.explain import explain
from oracle.told import sentence
from tests.conftest import prompt
from tests.gguf_writer import tokens as vocabulary
from tests.gguf_writer import write_gguf
from tests.oracle.standin import run, write
from weights import EMBEDDED, Checkpoint, open_checkpoint
from weights.tiny import tiny_config, write_random

TOKENS = prompt(23, 272)
# A block of Q4_0 is a float16 scale and 16 bytes: the first 16 numbers in their low bits, the others in the high ones.
SCALE, BYTES = 2, 16


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Checkpoint]:
    folder = tmp_path_factory.mktemp("packed")
    raw = tiny_config("qwen3", None, 3, hidden_size=64, intermediate_size=160)
    write_random(folder, raw, seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)
    names = vocabulary(folder)["tokenizer.ggml.tokens"]
    more = {"tokenizer.ggml.tokens": [*names[:-1], "ab"], "tokenizer.ggml.merges": ["a b"]}
    write_gguf(folder, folder / "model.gguf", "Q4_0", more)
    return raw, open_checkpoint(folder / "model.gguf")


def unpacked(matrix: np.ndarray) -> np.ndarray:
    """Q4_0's bytes of a matrix, read as if the numbers of a byte stood side by side."""
    blocks = quants.quantize(matrix, GGMLQuantizationType.Q4_0).reshape(-1, SCALE + BYTES)
    scale, data = blocks[:, :SCALE].copy().view(np.float16).astype(np.float32), blocks[:, SCALE:]
    low, high = (data & 15).astype(np.float32) - 8, (data >> 4).astype(np.float32) - 8
    return (scale * np.stack([low, high], axis=-1).reshape(len(data), -1)).reshape(matrix.shape)


def test_it_is_named_in_every_product_and_said_once(packed, tmp_path: Path) -> None:
    raw, checkpoint = packed
    tensors = {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.tensor_names}
    stored = {name: checkpoint.stored_as(name) for name in tensors}
    assert {"Q4_0"} == {stored[name] for name in tensors if tensors[name].ndim == 2}
    wrong = {name: unpacked(w) if w.ndim == 2 else w for name, w in tensors.items()}
    write(tmp_path, run(raw, wrong, TOKENS))
    told = explain(checkpoint, tmp_path, TOKENS)
    named = {c.stage: c.explanation and (c.explanation.hypothesis, c.explanation.parameter) for c in told.causes}
    products = ("embedding", "qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
    assert named == dict.fromkeys(products, ("weight_nibbles", "turns of 32"))
    said = sentence(told)
    assert said.count("blocks of 32 weights are unpacked wrongly") == 1 and said.count("(as embedding)") == 6
    assert any("in another order" in note for note in told.found.notes)


def test_float16_that_is_read_as_bfloat16(tmp_path: Path) -> None:
    raw = tiny_config("qwen2", None, 1)
    write_random(tmp_path / "model", raw, seed=5, dtype="float16")
    checkpoint = open_checkpoint(tmp_path / "model")
    weights = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.tensor_names}
    name = "model.layers.0.mlp.up_proj.weight"
    bits = weights[name].view(np.uint16).astype(np.uint32) << 16
    wrong = {each: values.astype(np.float32) for each, values in weights.items()} | {name: bits.view(np.float32)}
    write(tmp_path / "tree", run(raw, wrong, TOKENS))
    (cause,) = explain(checkpoint, tmp_path / "tree", TOKENS).causes
    assert cause.explanation is not None and cause.stage == "ffn_up"
    assert cause.explanation.hypothesis == "weight_dtype"
    assert cause.explanation.text == "the float16 values of up_proj are read as bfloat16"
