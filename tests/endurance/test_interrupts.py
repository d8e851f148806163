"""Ctrl-C at any moment: no half file stays, and the same command finishes the dump."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path

from tests.endurance.events import Disk, interrupt
from tests.endurance.trees import check_honest, contents, put_foreign
from tests.trees import write_tree


def test_ctrl_c_at_any_moment(tmp_path: Path, zoo) -> None:
    folder = tmp_path / "tree"
    run = partial(write_tree, zoo("qwen2"), tokens=[5, 6, 7], stages="attn_norm,attn_out", layers="0..1")
    put_foreign(tmp_path / "whole")
    run(output=tmp_path / "whole")
    whole, interrupted = contents(tmp_path / "whole"), 0
    for at in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        put_foreign(folder)
        disk = Disk(folder, at, interrupt)
        try:
            with disk.watched():
                run(output=folder)
        except KeyboardInterrupt:
            interrupted += 1
            check_honest(folder, whole)
            assert not [name for name in contents(folder) if name.endswith(".tmp")]
            run(output=folder)
        # Else it came in a destructor, where Python drops it.
        assert contents(folder) == whole
        if not disk.struck:
            break
    assert interrupted > 20
