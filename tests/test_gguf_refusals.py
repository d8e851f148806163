"""GGUF files that are broken, or that ask for maths we do not have: each ends in one line that names what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gguf_writer import write_gguf
from weights import UserError, open_checkpoint
from weights.tiny import tiny_config, write_random

BLOCKS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "head_dim": 64,
}  # rows of whole blocks


def tiny(folder: Path, **changes) -> Path:
    write_random(folder, tiny_config("qwen2", None, 2, **changes), dtype="float32")
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tiny(tmp_path / "hf"), tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "llama"}, "general.architecture 'llama' is not supported; supported are qwen2"),
        ({"general.architecture": "qwen2", "general.type": ["model"]}, r"general.type is \['model'\]"),
        ({"general.type": "mmproj"}, "general.type is 'mmproj'"),
        ({"qwen2.embedding_length": None}, "qwen2.embedding_length is missing"),
        ({"qwen2.embedding_length": 64}, r"has shape \[\d+, 72\], the config wants \[\d+, 64\]"),
        ({"qwen2.block_count": 3}, "missing model.layers.2.input_layernorm.weight"),
        ({"qwen2.block_count": 1}, "unknown model.layers.1.input_layernorm.weight"),
        ({"qwen2.block_count": 4_000_000_000}, "but there are 27 tensors"),
        ({"qwen2.attention.head_count": [6, 6]}, r"num_attention_heads must be .* not \[6, 6\]"),
        ({"qwen2.attention.value_length": 8}, "qwen2.attention.value_length = 8 is not supported: each head has 16"),
        ({"qwen2.rope.dimension_count": 8}, "qwen2.rope.dimension_count = 8"),
        ({"qwen2.attention.sliding_window": 512}, "qwen2.attention.sliding_window = 512 is not supported"),
        ({"qwen2.attention.causal": False}, "qwen2.attention.causal = False"),
        ({"qwen2.attention.logit_softcapping": 30.0}, "might change the maths: qwen2.attention.logit_softcapping"),
        ({"qwen2.rope.scaling.type": "longrope", "qwen2.rope.scaling.factor": 2.0}, "'longrope' is not supported"),
        ({"qwen2.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"tokenizer.ggml.tokens": 7}, "vocab_size must be a positive whole number, not 0"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, r"the config wants \[2, 72\]"),
    ],
)
def test_metadata_that_would_change_the_maths_is_refused(tmp_path: Path, changes: dict, says: str) -> None:
    path = write_gguf(tiny(tmp_path / "hf"), tmp_path / "changed.gguf", changes=changes)
    with pytest.raises(UserError, match=says) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_unknown_tensors_and_types_are_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "hf", **BLOCKS)
    path = write_gguf(folder, tmp_path / "a.gguf")
    # One name as long as the other, and one number of a type: NVFP4 for Q8_0.
    path.write_bytes(path.read_bytes().replace(b"output_norm.weight", b"rope_freqs_.weight"))
    with pytest.raises(UserError, match=r"missing model\.norm\.weight \[256\]; unknown rope_freqs_\.weight"):
        open_checkpoint(path)
    path = write_gguf(folder, tmp_path / "b.gguf", "Q8_0")
    stored = re.compile(rb"(token_embd\.weight.{20})\x08", re.DOTALL)
    path.write_bytes(stored.sub(lambda found: found[1] + b"\x28", path.read_bytes(), count=1))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight .* is stored as NVFP4; supported are F32"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda data: data[:-100], "it ends inside .*truncated"),
        (lambda data: data[:3000], "it ends inside its header: truncated"),
        (lambda data: b"", "cannot mmap an empty file"),
        (lambda data: b"GGML" + data[4:], "does not begin with GGUF"),
        (lambda data: b"\xff" * 4096, "does not begin with GGUF"),
        (lambda data: data[:4] + b"\0\0\0\3" + data[8:], "version 0x3000000 is not supported"),
        (lambda data: data[:8] + b"\xff" * 16 + data[24:], "not a whole GGUF file"),
        (lambda data: data.replace(b"attn_q.weight", b"attn_k.weight"), "is there twice"),
    ],
)
def test_a_broken_file_is_one_line(file: Path, broken, says: str) -> None:
    file.write_bytes(broken(file.read_bytes()))
    with pytest.raises(UserError, match=says) as error:
        open_checkpoint(file)
    assert "\n" not in str(error.value)


@given(places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_ends_in_a_traceback(file: Path, places: list[tuple[float, int]]) -> None:
    data = bytearray(file.read_bytes())
    for where, value in places:
        data[int(where * 9000)] = value  # the metadata and the tensors' table
    file.with_name("changed.gguf").write_bytes(data)
    try:
        open_checkpoint(file.with_name("changed.gguf")).tokenizer()
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe' is not supported"),
        ({"tokenizer.ggml.merges": ["x y z"]}, "the tokenizer is not readable"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path, changes: dict, says: str) -> None:
    path = write_gguf(tiny(tmp_path / "hf"), tmp_path / "other.gguf", changes=changes)
    with pytest.raises(UserError, match=says) as error:
        open_checkpoint(path).tokenizer()
    assert "\n" not in str(error.value)
