"""The trees of Hugging Face and of llama.cpp are written by the same hands: a full disk and Ctrl-C end alike."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from oracle.__main__ import main
from tests.endurance.events import Disk, failing, interrupt
from tests.endurance.processes import here
from tests.endurance.test_disk import GROWING
from tests.endurance.trees import check_honest, contents, put_foreign
from tests.gguf_writer import tokens, write_gguf


@pytest.fixture(params=["hf", "llama-cpp"])
def words(request, zoo, tmp_path: Path) -> list[str]:
    model = zoo("qwen2")
    if request.param == "llama-cpp":
        pytest.importorskip("xllamacpp")
        model, folder = tmp_path / "m.gguf", zoo("qwen3")
        # llama.cpp wants at least one merge, which our tiny vocabulary has not.
        merged = {"tokenizer.ggml.tokens": [*tokens(folder)["tokenizer.ggml.tokens"][:-1], "ab"]}
        write_gguf(folder, model, changes=merged | {"tokenizer.ggml.merges": ["a b"]})
    return [request.param, str(model), "--tokens", "5,6,7", "--stages", "attn_norm,ffn_out", "--quiet"]


def test_what_breaks_a_dump_off_leaves_it_to_be_finished(tmp_path: Path, capsys, words: list[str]) -> None:
    put_foreign(tmp_path / "whole")
    assert here(words, tmp_path / "whole", capsys, main) == (0, "")
    whole, folder = contents(tmp_path / "whole"), tmp_path / "tree"
    full = "error: {}: the disk is full; free some space and run the same command again\n"
    ends = {failing(errno.ENOSPC): (2, full), interrupt: (130, "error: interrupted; nothing half-written is left")}
    for act, (code, says) in ends.items():
        for at in (12, 25):
            shutil.rmtree(folder, ignore_errors=True)
            put_foreign(folder)
            disk = Disk(folder, at, act, GROWING)
            with disk.watched():
                ended, said = here(words, folder, capsys, main)
            if act is interrupt and ended == 0 and words[0] == "hf":  # it came in a destructor, where Python drops it
                assert contents(folder) == whole
                continue
            assert ended == code and said.strip().startswith(says.split("{}")[0]) and len(said.split("\n")) <= 3, said
            check_honest(folder, whole)
            assert not [name for name in contents(folder) if name.endswith(".tmp")]
            assert here(words, folder, capsys, main) == (0, "")
            assert contents(folder) == whole
