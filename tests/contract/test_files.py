"""APR-TRACE-SAVE-002, -004, -005, -006, -007, -010 and ATTN-SUB-005: the bytes of the files."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from jaxref.stage_file import StageFile
from jaxref.stages import STAGES
from tests.conftest import PROMPT
from tests.trees import read_tree, tree_bytes, write_tree


def test_apr_trace_save_002_same_bytes_on_re_run(zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path / "a", list(PROMPT))
    write_tree(zoo("qwen2"), tmp_path / "b", list(PROMPT))
    first = tree_bytes(tmp_path / "a")
    assert first == tree_bytes(tmp_path / "b")
    assert len(first) == 1 + 17 * 4 + 2


def test_apr_trace_save_004_header(zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path, list(PROMPT), stages="attn_out", layers="2")
    data = (tmp_path / "layer-2" / "attn_out.bin").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"APRT", 2, 7 * 72)
    assert len(data) == 12 + 4 * 7 * 72


def test_apr_trace_save_005_several_stages_in_one_run(zoo, tmp_path) -> None:
    write_tree(zoo("qwen3"), tmp_path, list(PROMPT), stages="q_norm, K_NORM,attn_norm", layers="0,3")
    assert sorted(read_tree(tmp_path)) == [
        f"layer-{layer}/{stage}.bin" for layer in (0, 3) for stage in ("attn_norm", "k_norm", "q_norm")
    ]


def test_apr_trace_save_006_a_nan_keeps_its_bits(tmp_path) -> None:
    bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800000, 0x3F800000], np.uint32)
    file = StageFile(tmp_path, STAGES["attn_norm"], 0, (2, 2), "aprt", np.float32)
    assert file.write(bits.view(np.float32).reshape(2, 2))
    entry = file.close()
    assert (tmp_path / entry["path"]).read_bytes()[12:] == bits.tobytes()
    assert (entry["nan"], entry["inf"], entry["min"], entry["max"]) == (2, 1, 1.0, 1.0)


def test_apr_trace_save_007_a_layer_subset_writes_only_those_layers(zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path, list(PROMPT), layers="1..3")
    assert {path.split("/")[0] for path in read_tree(tmp_path)} == {
        "layer-1",
        "layer-2",
        "final_norm.bin",
        "lm_head.bin",
    }


def test_apr_trace_save_010_the_head_lies_at_the_root(zoo, tmp_path) -> None:
    write_tree(zoo("qwen2"), tmp_path, list(PROMPT), stages="lm_head")
    data = (tmp_path / "lm_head.bin").read_bytes()
    assert struct.unpack("<4sII", data[:12]) == (b"APRT", 0xFFFFFFFF, 272)
    assert sorted(read_tree(tmp_path)) == ["lm_head.bin"]


def test_attn_sub_005_logits_are_the_same_with_and_without_capture(zoo, tmp_path) -> None:
    everything = write_tree(zoo("qwen2"), tmp_path / "all", list(PROMPT))
    alone = write_tree(zoo("qwen2"), tmp_path / "alone", list(PROMPT), stages="lm_head")
    assert everything.logits is not None and alone.logits is not None
    assert everything.logits.tobytes() == alone.logits.tobytes()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_manifest_says_what_is_there(zoo, tmp_path, name: str) -> None:
    import hashlib

    write_tree(zoo(name), tmp_path, list(PROMPT))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {entry["path"] for entry in manifest["files"]} == set(read_tree(tmp_path))
    assert manifest["tokens"] == list(PROMPT)
    assert manifest["matmul_precision"] == "HIGHEST"
    for entry in manifest["files"]:
        data = (tmp_path / entry["path"]).read_bytes()
        values = np.frombuffer(data[12:], np.float32)
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert np.prod(entry["shape"]) == values.size
        assert (entry["min"], entry["max"]) == (values.min(), values.max())
        assert entry["mean"] == pytest.approx(values.mean(dtype=np.float64), abs=1e-9)
