"""GGUF checkpoints: the same numbers, stage by stage, as the folder that they were made from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants

from tests.gguf_writer import write_gguf
from tests.trees import distance, read_tree, tree_bytes, write_tree
from weights import Checkpoint, UserError, open_checkpoint, open_tokenizer
from weights.gguf_config import config_from_metadata
from weights.gguf_file import QUANTISED
from weights.tiny import tiny_config, write_random

TOKENS = [54, 71, 64, 83, 220, 17, 10]
# Rows of whole blocks, whatever the type: 256 divides them.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
EXPERT_BYTES = 3 * 40 * 72 * 4  # of a tiny qwen3_moe in float32


def tiny(folder: Path, arch: str = "qwen2", dtype: str = "float32", layers: int = 2, **changes) -> Path:
    write_random(folder, tiny_config(arch, None, layers, **changes), dtype=dtype)
    return folder


def same(gguf: Checkpoint, folder: Checkpoint) -> bool:
    assert sorted(gguf.tensor_names) == sorted(folder.tensor_names)
    pairs = [(gguf.tensor(n), folder.tensor(n)) for n in folder.tensor_names]
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tiny(tmp_path / "hf"), tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "moe", "qwen2-yarn", "qwen3-linear"])
def test_a_file_is_the_folder_it_was_made_from(zoo, tmp_path: Path, name: str) -> None:
    gguf = open_checkpoint(write_gguf(zoo(name), tmp_path / "model.gguf"))
    folder = open_checkpoint(zoo(name))
    assert same(gguf, folder)
    # A file states float32 numbers; the maths in float32 is the same.
    eps = float(np.float32(folder.config.rms_norm_eps))
    assert gguf.config == dataclasses.replace(folder.config, rms_norm_eps=eps)
    write_tree(zoo(name), tmp_path / "folder", TOKENS)
    write_tree(tmp_path / "model.gguf", tmp_path / "gguf", TOKENS)
    assert tree_bytes(tmp_path / "gguf") == tree_bytes(tmp_path / "folder")


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_half_precision_is_a_view_in_its_own_dtype(tmp_path: Path, dtype: str, kind: str) -> None:
    folder = open_checkpoint(tiny(tmp_path / "hf", "qwen3_moe", dtype))
    gguf = open_checkpoint(write_gguf(folder.folder, tmp_path / "half.gguf", kind))
    assert same(gguf, folder)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert gguf.dtype(name) == folder.dtype(name)
    assert gguf.dtype("model.norm.weight") == np.float32
    assert not gguf.tensor(name).flags.owndata


@pytest.mark.parametrize("kind", [kind.name for kind in QUANTISED])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe"])
def test_quantised_rows_are_those_of_the_whole_tensor(tmp_path: Path, arch: str, kind: str) -> None:
    changes = WIDE if arch == "qwen2" else WIDE | {"moe_intermediate_size": 256, "num_experts": 4}
    path = write_gguf(tiny(tmp_path / "hf", arch, **changes), tmp_path / "q.gguf", kind)
    gguf = open_checkpoint(path)
    whole = {t.name: quants.dequantize(np.array(t.data), t.tensor_type) for t in GGUFReader(path).tensors}
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.down_proj", "blk.1.ffn_down")):
        expected = whole[f"{theirs}.weight"]
        assert gguf.stored_as(f"{ours}.weight") == kind
        found = gguf.tensor(f"{ours}.weight")
        assert found.dtype == gguf.dtype(f"{ours}.weight") == np.float32
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(gguf.tensor(f"{ours}.weight", 5, 9), expected[5:9])
        np.testing.assert_array_equal(gguf.tensor(f"{ours}.weight", 250), expected[250:])
    np.testing.assert_array_equal(gguf.embedding_rows(np.array([9, 3])), whole["token_embd.weight"][[9, 3]])
    np.testing.assert_array_equal(np.concatenate(list(gguf.head_blocks(100))), whole["output.weight"])
    if arch == "qwen3_moe":
        np.testing.assert_array_equal(gguf.expert(0, 2).up_proj, whole["blk.0.ffn_up_exps.weight"][2])


def test_a_quantised_dump_is_that_of_its_dequantised_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny(tmp_path / "hf", "qwen3", **WIDE)
    gguf = open_checkpoint(write_gguf(folder, tmp_path / "q.gguf", "Q8_0"))
    stored = load_file(folder / "model.safetensors")
    save_file({name: np.array(gguf.tensor(name)) for name in stored}, folder / "model.safetensors")
    write_tree(folder, tmp_path / "a", TOKENS)
    write_tree(gguf.folder, tmp_path / "b", TOKENS)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_only_what_is_asked_for_is_read(zoo, tmp_path: Path) -> None:
    gguf = open_checkpoint(write_gguf(zoo("moe"), tmp_path / "moe.gguf"))
    assert gguf.bytes_read == 0
    gguf.expert(2, 5)
    assert gguf.bytes_read == EXPERT_BYTES
    gguf.embedding_rows(np.array([3, 7]))
    assert gguf.bytes_read == EXPERT_BYTES + 2 * 72 * 4
    gguf.release()
    report = write_tree(gguf.folder, tmp_path / "gguf", [5])
    # One token at three MoE layers chooses two of eight experts.
    stored = sum(int(np.prod(gguf.shape(n))) * 4 for n in gguf.tensor_names if ".experts." not in n)
    embedding = 272 * 72 * 4
    assert report.read == stored - embedding + 72 * 4 + 3 * 2 * EXPERT_BYTES


def test_the_parts_of_a_split_model_are_one(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "hf")
    first = write_gguf(folder, tmp_path / "split.gguf", per_part=10)
    assert first.name == "split-00001-of-00003.gguf"
    gguf = open_checkpoint(first)
    assert len(gguf.files) == 3
    assert same(gguf, open_checkpoint(folder))
    second = tmp_path / "split-00002-of-00003.gguf"
    with pytest.raises(UserError, match="one of 3 parts of a model; give the first"):
        open_checkpoint(second)
    shutil.copy(first, second)
    with pytest.raises(UserError, match="does not say that it is part 2 of 3"):
        open_checkpoint(first)
    second.unlink()
    with pytest.raises(UserError, match=r"split-00002-of-00003\.gguf: no such file"):
        open_checkpoint(first)


def test_rope_scaling_is_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    known = open_checkpoint(write_gguf(tiny(tmp_path / "hf"), tmp_path / "a.gguf")).files["a.gguf"].metadata

    def scaling(**stated):
        keys = {f"qwen2.rope.scaling.{key}": value for key, value in stated.items()}
        return config_from_metadata(known | keys, range(99)).rope_scaling

    assert scaling() is scaling(type="none", factor=4.0) is scaling(factor=0.0) is None
    assert scaling(factor=4.0) == scaling(type="linear", factor=4.0, finetuned=True)
    yarn = scaling(type="yarn", factor=4.0)
    assert yarn is not None and yarn.original_max_position_embeddings == 4096
    assert scaling(type="yarn", factor=4.0, yarn_beta_fast=16.0, yarn_ext_factor=1.0).beta_fast == 16


def test_the_tokenizer_is_the_folders(file: Path, tmp_path: Path) -> None:
    ours, theirs = open_checkpoint(file).tokenizer(), open_tokenizer(tmp_path / "hf")
    assert ours is not None and theirs is not None
    for text in ("What is 2+2?", "Hé, wörld\n\n\t 中文 🙂", "<|im_start|>user\nI'LL<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.chat("Hi") == theirs.chat("Hi")


def test_merges_give_what_transformers_gives(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="transformers reads GGUF by it")
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import AutoTokenizer

    folder = tiny(tmp_path / "hf", vocab_size=400)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stated = json.loads(backend.to_str())
    vocab, merges = stated["model"]["vocab"], []
    for pair in ("Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "' t", "n 't", "1 2", "Ċ Ċ", "e r", "ö r"):
        a, b = pair.split()
        if a in vocab and b in vocab:
            merges.append((a, b))
            vocab[a + b] = len(vocab) + 3  # the three special tokens come after the bytes
    backend.model = BPE(vocab=vocab, merges=merges)
    backend.save(str(folder / "tokenizer.json"))
    path = write_gguf(folder, tmp_path / "merged.gguf")
    ours, theirs = open_checkpoint(path).tokenizer(), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in ("the other thing isn't in  there\n\n\n", "12123 THE'T wörld", "<|im_start|>the<|im_end|>"):
        assert ours is not None and ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours is not None and len(ours.encode(" the")) == 1


def test_the_commands_take_a_file(file: Path, tmp_path: Path) -> None:
    def run(module: str, *words: object) -> str:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, check=True
        ).stdout

    assert json.loads(run("weights", "inspect", file, "--json"))["tensors"][0]["stored_as"] == "F32"
    run("jaxref", "dump", file, "--prompt", "Hi", "--chat", "--output", tmp_path / "tree", "--quiet")
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    assert manifest["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [weights["file"] for weights in manifest["weights"]] == ["tiny.gguf"]
    assert manifest["model"] == "tiny.gguf"
    words = ["--max-tokens", 3, "--json"]
    assert run("jaxref", "generate", file, *words) == run("jaxref", "generate", tmp_path / "hf", *words)


@pytest.mark.real_model
def test_the_real_file_within_its_memory(real_model: Path, tmp_path: Path) -> None:
    path = next(real_model.glob("*.gguf"))
    code = (  # of the process itself: `ru_maxrss` begins with what the one that started it had
        "import re, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('jaxref', run_name='__main__')\n"
        "finally: print(re.search('VmHWM: *(.*) kB', open('/proc/self/status').read().replace('\\t', ' '))[1])"
    )
    words = [sys.executable, "-c", code, "jaxref", "dump", path, "--output", tmp_path / "tree", "--quiet"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) * 1024 <= 1.5e9
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    assert manifest["tokens"] == [3838, 374, 220, 17, 10, 17, 30]
    write_tree(real_model / "hf", tmp_path / "hf", manifest["tokens"])
    ours, theirs = read_tree(tmp_path / "tree")["lm_head.bin"], read_tree(tmp_path / "hf")["lm_head.bin"]
    # The folder holds the same weights rounded to bfloat16.
    assert distance(ours, theirs) < 2e-2
    assert ours.argmax() == theirs.argmax()
