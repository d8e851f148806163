"""Checkpoints: every layout opens to the same numbers, and whatever is broken is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from weights import EMBEDDED, Checkpoint, UserError, config_from_dict, open_checkpoint, open_tokenizer
from weights.tiny import tiny_config, write_random

BASE = tiny_config("qwen2")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_random(tmp_path / "model", tiny_config("qwen2", None, 2), dtype="float32")
    return tmp_path / "model"


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(folder: Path) -> Path:
    """The same checkpoint as two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return all(np.array_equal(a.tensor(n), b.tensor(n)) for n in a.tensor_names)


def test_every_layout_opens_to_the_same_numbers(model: Path, tmp_path: Path, monkeypatch) -> None:
    whole = open_checkpoint(model)
    assert same(whole, open_checkpoint(model / "model.safetensors"))
    copy = shard(Path(shutil.copytree(model, tmp_path / "sharded")))
    assert same(whole, open_checkpoint(copy))
    assert same(whole, open_checkpoint(copy / "model.safetensors.index.json"))


def test_an_id_in_the_local_cache_opens(model: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / "abc"
    shutil.copytree(model, snapshot)
    (tmp_path / "hub" / "models--acme--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--acme--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = open_checkpoint("acme/tiny")
    assert checkpoint.name == "acme/tiny"
    assert same(open_checkpoint(model), checkpoint)


def test_only_what_is_asked_for_is_read(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert checkpoint.bytes_read == 0
    rows = checkpoint.embedding_rows(np.array([3, 3, 7]))
    assert rows.shape == (3, 72)
    assert checkpoint.bytes_read == rows.nbytes
    blocks = list(checkpoint.head_blocks(100))
    assert [len(b) for b in blocks] == [100, 100, 72]
    np.testing.assert_array_equal(np.concatenate(blocks), checkpoint.tensor("lm_head.weight"))


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_random(tmp_path / name, BASE, seed=seed)
    a, b, c = (open_checkpoint(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)
    norm = a.tensor("model.layers.1.input_layernorm.weight").astype(np.float32)
    assert norm.std() > 0.1 and abs(norm.mean() - 1) < 0.2


def test_the_embedded_model_is_what_the_command_makes(tmp_path: Path) -> None:
    write_random(tmp_path / "model", BASE)
    for file in EMBEDDED.iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 1_000_000


def test_the_embedded_tokenizer_gives_bytes_and_back() -> None:
    tokenizer = open_tokenizer(EMBEDDED)
    assert tokenizer is not None
    text = "Hi, wörld\n"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "'llama' is not supported; supported are qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"secret_sauce": 1}, "unknown keys that might change the maths: secret_sauce"),
        ({"num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "x": 1}}, "unknown keys: x"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "disagree"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, not 0"),
        ({"vocab_size": None}, "vocab_size must be"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be"),
    ],
)
def test_a_config_that_would_change_the_maths_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config_from_dict(BASE | changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "beta_fast", "mscale", "mscale_all_dim", "truncate"]
KEYS = [*BASE, "rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "use_qk_norm"]


@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.sampled_from(["yarn", "linear"])),
)
@settings(max_examples=500, deadline=None)
def test_no_config_ends_in_a_traceback(changes: dict, rope: dict | None) -> None:
    try:
        config_from_dict(BASE | changes | ({} if rope is None else {"rope_parameters": rope}))
    except UserError as error:
        assert str(error)


def test_both_spellings_of_rope_are_one() -> None:
    old = {k: v for k, v in BASE.items() if k != "rope_theta"}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    newer = config_from_dict(old | {"rope_parameters": yarn | {"rope_theta": 5e5}})
    older = config_from_dict(old | {"rope_theta": 5e5, "rope_scaling": yarn})
    assert newer == older
    assert newer.rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing model.norm.weight \[72\]"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), r"unknown extra \[3\]"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(5, np.float32)}),
            r"has shape \[5\], the config wants \[72\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.ones(72, np.int32)}), "stored as I32"),
    ],
)
def test_wrong_tensors_are_named(model: Path, change, says: str) -> None:
    change_tensors(model, change)
    with pytest.raises(UserError, match=says):
        open_checkpoint(model)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "m", tiny_config("qwen2", None, 1, tie_word_embeddings=True))
    table = open_checkpoint(tmp_path / "m").tensor("model.embed_tokens.weight")
    change_tensors(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": table.copy()}))
    open_checkpoint(tmp_path / "m")
    change_tensors(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": table[::-1].copy()}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        open_checkpoint(tmp_path / "m")


def test_all_faults_are_listed_at_once(model: Path) -> None:
    def change(tensors) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.bias"]
        tensors["stray"] = np.zeros(1, np.float32)

    change_tensors(model, change)
    with pytest.raises(UserError) as error:
        open_checkpoint(model)
    assert all(name in str(error.value) for name in ("model.norm.weight", "layers.0.self_attn.q_proj.bias", "stray"))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("../outside.safetensors", "not a file of its own folder"),
        ("/etc/passwd", "not a file of its own folder"),
        ("weights.bin", "only .safetensors files are read"),
        ("absent.safetensors", "no such file"),
    ],
)
def test_an_index_may_not_point_elsewhere(model: Path, place: str, says: str) -> None:
    shard(model)
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match=says):
        open_checkpoint(model)


@pytest.mark.parametrize("broken", ["truncated", "empty", "noise", "folder"])
def test_a_broken_file_is_one_line(model: Path, broken: str) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if broken == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": data[:-100], "empty": b"", "noise": b"\xff" * 4096}[broken])
    with pytest.raises(UserError, match="safetensors") as error:
        open_checkpoint(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}', '{"model_type": []}', "\x00\xff"])
def test_a_broken_config_is_one_line(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as error:
        open_checkpoint(model)
    assert "\n" not in str(error.value)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickle files are never read"):
        open_checkpoint(tmp_path)
