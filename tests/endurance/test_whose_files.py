"""Whose the files of a folder are: what is not this dump's stays as it is, and the manifest lists what is there."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from jaxref import model
from jaxref.stage_file import StageFile
from jaxref.tree import MANIFEST, UNFINISHED
from tests.endurance.events import Crash, Disk, freeze
from tests.endurance.trees import contents
from tests.trees import write_tree
from weights import UserError

TOKENS = [5, 6, 7, 8, 9]


def test_a_smaller_dump_after_a_kill_does_not_forget_whose_the_files_are(tmp_path: Path, zoo) -> None:
    run = partial(write_tree, zoo("qwen2"), tokens=TOKENS, layers="0..2", output=tmp_path)
    disk = Disk(tmp_path, 60, freeze)
    with disk.watched(), pytest.raises(Crash):
        run(stages="all")
    left = {name for name in contents(tmp_path) if name.endswith((".bin", ".tmp"))}
    run(stages="attn_norm")
    found = contents(tmp_path)
    assert {name for name in found if name.endswith(".bin")} - {"layer-0/attn_norm.bin", "layer-1/attn_norm.bin"}
    assert not [name for name in found if name.endswith(".tmp")] and [name for name in left if name.endswith(".tmp")]
    run(stages="all")
    assert UNFINISHED not in contents(tmp_path)


@pytest.mark.parametrize("engine", ["layer-0/attn_out.bin", "layer-1/attn_norm.bin"])
def test_an_engine_file_beside_a_tree_is_not_written_over(tmp_path: Path, zoo, engine: str) -> None:
    run = partial(write_tree, zoo("qwen2"), tokens=TOKENS, output=tmp_path)
    run(stages="attn_norm", layers="0")
    (tmp_path / engine).parent.mkdir(exist_ok=True)
    (tmp_path / engine).write_bytes(b"an engine's")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"holds {engine}, which manifest.json does not list, so it is another program"):
        run(stages="attn_norm,attn_out", layers="0..2")
    assert contents(tmp_path) == before


def test_a_link_to_nothing_is_somebody_elses_too(tmp_path: Path, zoo) -> None:
    (tmp_path / "layer-0").mkdir()
    (tmp_path / "layer-0" / "attn_norm.bin").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"holds layer-0/attn_norm.bin and no manifest"):
        write_tree(zoo("qwen2"), tmp_path, TOKENS, stages="attn_norm")
    assert (tmp_path / "layer-0" / "attn_norm.bin").is_symlink()


def test_the_manifest_does_not_list_what_was_removed(tmp_path: Path, zoo) -> None:
    run = partial(write_tree, zoo("qwen2"), tokens=TOKENS, output=tmp_path)
    run(stages="attn_norm", layers="0..2")
    (tmp_path / "layer-0" / "attn_norm.bin").unlink()
    run(stages="attn_out", layers="0")
    listed = [entry["path"] for entry in json.loads((tmp_path / MANIFEST).read_text())["files"]]
    assert listed == ["layer-0/attn_out.bin", "layer-1/attn_norm.bin"]


def test_other_weights_under_the_same_header_are_told_from_the_first(tmp_path: Path, zoo) -> None:
    """Two fine-tunings of a model have the same header, and only whole files tell them apart."""
    shutil.copytree(zoo("qwen2"), tmp_path / "m")
    run = partial(write_tree, tmp_path / "m", tokens=TOKENS, output=tmp_path / "tree")
    run(stages="attn_norm,attn_out", layers="0")
    before = contents(tmp_path / "tree")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"attn_(norm|out).bin: other bytes than its manifest says came out"):
        run(stages="attn_norm,attn_out", layers="0")
    after = contents(tmp_path / "tree")
    assert after.pop(UNFINISHED)
    assert after == before


def test_a_file_whose_rows_did_not_all_come_is_not_there(tmp_path: Path, zoo, monkeypatch) -> None:
    """Whatever computes: a part of a tensor is no tensor."""
    monkeypatch.setattr(model, "SCORES_IN_BLOCK", 60)
    whole = StageFile.write
    monkeypatch.setattr(StageFile, "write", lambda self, block: whole(self, block) and False)
    with pytest.raises(UserError, match=r"layer-0/attn_scores.bin and 0 others were not made; no manifest tells of"):
        write_tree(zoo("qwen2"), tmp_path, TOKENS, stages="attn_scores", layers="0")
    assert set(contents(tmp_path)) == {UNFINISHED}
