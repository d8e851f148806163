"""What the commands refuse: one line, exit 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import ROOT, command, refused
from tests.trees import tree_bytes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dump", "/nowhere"], "no such model"),
        (["dump", "acme/unheard-of"], "neither a folder here nor an id in the local"),
        (["dump", "--tokens", "1,272"], "token ids [272] are outside the vocabulary"),
        (["dump", "--tokens", "-1"], "outside the vocabulary"),
        (["dump", "--tokens", ""], "at least one"),
        (["dump", "--tokens", "1,,2"], "whole numbers between commas"),
        (["dump", "--prompt", ""], "prompt is empty"),
        (["dump", "--prompt", "a\udcff"], "not valid UTF-8"),
        (["dump", "m" * 5000], "too long"),
        (["dump", "--prompt", "a", "--tokens", "1"], "exclude each other"),
        (["dump", "--tokens-file", "/nowhere"], "not readable as token ids"),
        (["dump", "--stages", "q_norm"], "qwen2 has no stage q_norm"),
        (["dump", "--stages", "nonsense"], "unknown stage 'nonsense'"),
        (["dump", "--stages", "a,,b"], "empty name"),
        (["dump", "--layers", "2..9"], "layers 0 to 3"),
        (["dump", "--positions", "12"], "positions 0 to 11"),
        (["dump", "--stages", "embedding", "--layers", "1"], "nothing to write"),
        (["dump", "--dtype", "int8"], "'int8' is not one of"),
        (["dump", "--device", "cuda"], "--device cuda"),
        (["dump", "--frobnicate"], "No such option"),
        (["nonsense"], "No such command"),
        (["stages", "/nowhere"], "no such model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, words: list[str], says: str) -> None:
    if words[0] == "dump":
        words = [*words, "--output", str(tmp_path / "tree")]
    assert says in refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_weights_commands_refuse_in_one_line(tmp_path: Path) -> None:
    assert "no such shape" in refused("tiny", tmp_path / "m", "--like", "900b", module="weights")
    assert "is a qwen2, not a qwen3" in refused(
        "tiny", tmp_path / "m", "--arch", "qwen3", "--like", "7b", module="weights"
    )
    assert "no such model" in refused("inspect", "/nowhere", module="weights")
    assert command("inspect", ROOT / "weights" / "embedded", module="weights").returncode == 0


def test_a_folder_with_another_dump_is_refused(tmp_path: Path) -> None:
    words = ["dump", "--output", tmp_path / "tree", "--stages", "attn_norm"]
    assert command(*words, "--tokens", "1,2").returncode == 0
    before = tree_bytes(tmp_path / "tree")
    assert "another dump (tokens differ)" in refused(*words, "--tokens", "1,3")
    assert "another dump (dtype differ)" in refused(*words, "--tokens", "1,2", "--dtype", "float64")
    assert tree_bytes(tmp_path / "tree") == before
    # The same run with other stages is welcome: the manifest then tells of both.
    assert command(*words, "--tokens", "1,2", "--stages", "attn_out").returncode == 0
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    assert [e["stage"] for e in manifest["files"]] == ["attn_norm", "attn_out"] * 4


def test_a_foreign_tree_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "layer-0").mkdir()
    (tmp_path / "layer-0" / "attn_norm.bin").write_bytes(b"an engine's")
    assert "another program's tree" in refused("dump", "--output", tmp_path)
    assert (tmp_path / "layer-0" / "attn_norm.bin").read_bytes() == b"an engine's"


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"schema": "other"}', '{"schema": "jaxref-tree-v1", "files": 3}'])
def test_a_broken_manifest_is_one_line(tmp_path: Path, broken: str) -> None:
    (tmp_path / "manifest.json").write_text(broken)
    assert "manifest.json" in refused("dump", "--output", tmp_path)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refused("dump", "--output", tmp_path / "file" / "tree")


def test_nothing_is_no_name(tmp_path: Path) -> None:
    assert "--output" in refused("dump", "tiny", "--output", "")
    assert "MODEL is empty" in refused("dump", "", "--output", tmp_path / "tree")
