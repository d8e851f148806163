"""Two models of one shape are told apart: by a dump, by a compare, and by who localises."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from oracle import compare
from oracle.engine_tree import EngineTree
from tests.gguf_writer import write_gguf
from tests.trees import write_tree
from weights import Checkpoint, UserError, open_checkpoint
from weights.identity import BLOCK, differing, same_weights, sample_places, sample_sha256
from weights.watched import Watched

TOKENS = [54, 71, 64]


def tuned(model: Path, folder: Path, names: Callable[[str], bool] = lambda name: True) -> Path:
    """A copy whose tensors are all a little other, as after a fine-tune; its header is the same."""
    shutil.copytree(model, folder)
    values = load_file(model / "model.safetensors")
    changed = {name: (x * np.asarray(1.02, x.dtype) if names(name) else x) for name, x in values.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    data, before = (path / "model.safetensors" for path in (folder, model))
    assert data.stat().st_size == before.stat().st_size
    return folder


@pytest.fixture(scope="module")
def pair(zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its fine-tune, written by the same writer."""
    root = tmp_path_factory.mktemp("which")
    return tuned(zoo("qwen2"), root / "base", lambda name: False), tuned(zoo("qwen2"), root / "tuned")


def identity(model: Path, **options) -> dict:
    (found,) = open_checkpoint(model).identity(**options)
    return found


def test_a_fine_tune_has_another_sample_and_nothing_else(pair: tuple[Path, Path]) -> None:
    ours, theirs = map(identity, pair)
    assert {key for key in ours if ours[key] != theirs[key]} == {"sample_sha256"}
    assert identity(pair[0]) == ours
    assert set(identity(pair[0], whole_files=True)) == {*ours, "sha256"}


def test_of_a_gguf_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, model in zip(("a", "b"), pair, strict=True):
        (tmp_path / name).mkdir()
        write_gguf(model, tmp_path / name / "m.gguf", "F16")
    ours, theirs = (identity(tmp_path / name / "m.gguf") for name in ("a", "b"))
    assert {key for key in ours if ours[key] != theirs[key]} == {"sample_sha256"}


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 100_000, 66 * BLOCK, 66 * BLOCK + 5, 10**6, 15 * 10**9])
def test_where_the_blocks_lie(size: int) -> None:
    places = sample_places(size)
    assert places == sorted(set(places)) and places[0] == 0 and len(places) <= 66
    assert places[-1] == max(0, size - BLOCK)
    gaps = [b - a - BLOCK for a, b in pairwise(places)]
    if size <= 66 * BLOCK:
        assert max(gaps, default=0) <= 0  # all of it is seen
    else:
        assert len(places) == 66 and max(gaps) <= size / 65 + BLOCK


def test_what_a_sample_sees(tmp_path: Path) -> None:
    """A byte in any of its blocks, and none between them: that is what hashing whole files is for."""
    path, size = tmp_path / "x", 4_000_000
    data = bytearray(size)
    path.write_bytes(data)
    plain, places = sample_sha256(Watched(path)), sample_places(size)
    seen = {index for index in range(0, size, 512) if any(p <= index < p + BLOCK for p in places)}
    for index in [0, size - 1, places[30], places[64] + BLOCK - 1, *range(BLOCK, 60_000, 20_000)]:
        data[index] = 1
        path.write_bytes(data)
        data[index] = 0
        hit = index // 512 * 512 in seen
        assert (sample_sha256(Watched(path)) != plain) == hit, index


def test_a_file_of_gigabytes_takes_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(15_000_000_000)  # a hole: no disk is used
    begun = time.perf_counter()
    sample_sha256(Watched(path))
    assert time.perf_counter() - begun < 0.1


def test_a_dump_is_not_mixed_with_a_fine_tunes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_tree(pair[0], tmp_path / "tree", TOKENS, stages="attn_norm")
    before = (tmp_path / "tree" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another dump \(weights differ\)"):
        write_tree(pair[1], tmp_path / "tree", TOKENS, stages="ffn_norm")
    assert (tmp_path / "tree" / "manifest.json").read_bytes() == before
    write_tree(pair[0], tmp_path / "tree", TOKENS, stages="ffn_norm")


def test_compare_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, model in zip(("a", "b"), pair, strict=True):
        write_tree(model, tmp_path / name, TOKENS, stages="attn_norm")
    words = "weights differ: .*/a and .*/b are of different models: the bytes of model.safetensors differ"
    with pytest.raises(UserError, match=words):
        compare(tmp_path / "a", tmp_path / "b")


def test_localize_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """And goes on: an export that went wrong is a thing to look for."""
    write_tree(pair[1], tmp_path / "b", TOKENS)
    words = f"weights differ: {tmp_path / 'b'} was made from other bytes of model.safetensors than the model's"
    assert EngineTree(tmp_path / "b", open_checkpoint(pair[0])).notes == [words]
    assert EngineTree(tmp_path / "b", open_checkpoint(pair[1])).notes == []


def test_a_tree_of_an_older_version_is_read_by_what_it_says(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest has no sample: the headers agree, as they did then."""
    identity = Checkpoint.identity

    def older(self: Checkpoint, **options) -> list[dict]:
        return [{k: v for k, v in file.items() if k != "sample_sha256"} for file in identity(self, **options)]

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "identity", older)
        write_tree(pair[0], tmp_path / "old", TOKENS, stages="attn_norm")
    assert "sample_sha256" not in (tmp_path / "old" / "manifest.json").read_text()
    write_tree(pair[0], tmp_path / "new", TOKENS, stages="attn_norm")
    assert compare(tmp_path / "old", tmp_path / "new").exit_code == 0
    assert EngineTree(tmp_path / "old", open_checkpoint(pair[0])).notes == []
    write_tree(pair[0], tmp_path / "old", TOKENS, stages="ffn_norm")
    (file,) = json.loads((tmp_path / "old" / "manifest.json").read_text())["weights"]
    assert "sample_sha256" in file


FILE = {"file": "m", "size": 1, "header_sha256": "h", "sample_sha256": "s", "sha256": "w"}


@pytest.mark.parametrize(
    ("changes", "same", "others"),
    [
        ({}, True, []),
        ({"sample_sha256": "x"}, False, ["m"]),
        ({"sha256": "x"}, False, ["m"]),
        ({"sha256": None}, False, []),
        ({"size": 2}, False, []),
        ({"file": "n"}, False, []),  # the same under another name
        ({"file": "n", "sample_sha256": "x"}, False, ["m"]),
        ({"header_sha256": "x"}, False, []),
        ({"header_sha256": "x", "sample_sha256": "x"}, False, []),  # it may be the same model in another dtype
        ({"header_sha256": "x", "sha256": "x"}, False, ["m"]),
    ],
)
def test_by_what_files_are_told_apart(changes: dict, same: bool, others: list[str]) -> None:
    other = FILE | changes
    assert (same_weights([FILE], [other]), differing([FILE], [other])) == (same, others)
    assert (same_weights([other], [FILE]), bool(differing([other], [FILE]))) == (same, bool(others))
    assert not same_weights([FILE], [FILE, other])


def test_what_only_one_of_them_says_is_no_difference() -> None:
    for lacking in ("sample_sha256", "sha256"):
        older = {key: value for key, value in FILE.items() if key != lacking}
        assert same_weights([FILE], [older]) and not differing([FILE], [older])
    assert not same_weights([FILE], [{"file": "m", "size": 1}])
    assert differing([{"header_sha256": ["h"], "file": 3}], [FILE]) == []
