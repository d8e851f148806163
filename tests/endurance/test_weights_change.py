"""A checkpoint that somebody cuts, writes over, replaces or removes while it is in use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from jaxref.reader import Reader
from jaxref.tree import MANIFEST, UNFINISHED
from tests.endurance.processes import ended
from tests.endurance.trees import check_honest, contents, put_foreign
from tests.gguf_writer import write_gguf
from tests.trees import write_tree
from weights import Layer, UserError, open_checkpoint


def cut(path: Path) -> None:
    os.truncate(path, 8192)


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


CHANGES: dict[Callable[[Path], object], str] = {
    cut: r"changed while it was in use \([\d,]+ bytes then, 8,192 now\)",
    write_over: "changed while it was in use; run again",
    replace: "changed while it was in use; run again",
    Path.unlink: "is gone since it was opened: No such file",
}


def before_the_third(change: Callable[[], object]) -> Callable[[Reader, int], Layer]:
    """`Reader.layer` that changes the file before it reads: in its own thread, so that no other one reads meanwhile."""
    read = Reader.layer

    def changing(self: Reader, index: int) -> Layer:
        if index == 2:
            change()
        return read(self, index)

    return changing


@pytest.fixture(params=["safetensors", "gguf"])
def weights(request, zoo, tmp_path: Path) -> tuple[Path, Path]:
    """A model of one's own, and its file of weights."""
    if request.param == "gguf":
        write_gguf(zoo("qwen2"), tmp_path / "m.gguf", "F16")
        return tmp_path / "m.gguf", tmp_path / "m.gguf"
    shutil.copytree(zoo("qwen2"), tmp_path / "m")
    return tmp_path / "m", tmp_path / "m" / "model.safetensors"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_between_layers_it_is_an_error_and_no_manifest_tells_of_the_old_weights(
    tmp_path: Path, weights: tuple[Path, Path], monkeypatch, change: Callable[[Path], object]
) -> None:
    model, file = weights
    put_foreign(tmp_path / "tree")
    monkeypatch.setattr(Reader, "layer", before_the_third(partial(change, file)))
    with pytest.raises(UserError, match=f"{file}: {CHANGES[change]}"):
        write_tree(model, tmp_path / "tree", [1, 2, 3])
    found = contents(tmp_path / "tree")
    assert MANIFEST not in found and UNFINISHED in found
    assert not [name for name in found if name.endswith(".tmp")]
    check_honest(tmp_path / "tree", found)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_at_the_very_end_as_well(tmp_path: Path, zoo, change: Callable[[Path], object]) -> None:
    """Of a dump without the head, whose last reading is long over."""
    shutil.copytree(zoo("qwen2"), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    with pytest.raises(UserError, match=CHANGES[change]):
        write_tree(
            tmp_path / "m",
            tmp_path / "tree",
            [1, 2],
            stages="attn_norm",
            layers="0..2",
            progress=lambda layer: change(file) if layer == 1 else None,
        )
    assert MANIFEST not in contents(tmp_path / "tree")


def cut_later(folder: Path) -> None:
    Reader.layer = before_the_third(partial(cut, folder.parent / "m" / "model.safetensors"))


def test_the_command_says_so_in_one_line(tmp_path: Path, zoo) -> None:
    shutil.copytree(zoo("qwen2"), tmp_path / "m")
    code, said = ended(["dump", tmp_path / "m", "--tokens", "1,2", "--quiet"], tmp_path / "tree", prepare=cut_later)
    assert code == 2 and len(said.splitlines()) == 1 and "model.safetensors: changed while it was in use" in said


def test_a_checkpoint_that_nobody_touches_is_read_as_before(weights: tuple[Path, Path], monkeypatch, tmp_path) -> None:
    """From another folder too, and through a link, as the Hugging Face cache has them."""
    model, file = weights
    real = file.with_name("blob")
    file.rename(real)
    file.symlink_to(real.name)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(Path(model.name))
    monkeypatch.chdir("/")
    assert np.isfinite(checkpoint.tensor("model.norm.weight").astype(np.float32)).all()
    checkpoint.release()
