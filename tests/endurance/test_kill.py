"""A dump that is killed at any moment: nothing half-written passes for whole, and the same command finishes it.

Most of the kills are simulated in this process, where hundreds take seconds: the disk is left as the kill would leave
it. A few are real. `python -m tests.endurance.kill` kills a real process at every event.
"""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path

import pytest

from jaxref import model
from jaxref.tree import MANIFEST, UNFINISHED
from tests.endurance.events import Crash, Disk, freeze
from tests.endurance.kill import run_case
from tests.endurance.trees import check_honest, contents, put_foreign
from tests.trees import write_tree
from weights import UserError

TOKENS = [5, 6, 7, 8, 9]
# name -> (model of the zoo, options)
CASES = {
    "aprt": ("qwen2", {"stages": "embedding,attn_norm", "layers": "0..2"}),
    "blocks": ("qwen2", {"stages": "attn_scores", "layers": "0"}),
    "safetensors": ("qwen2-yarn", {"stages": "final_norm,lm_head", "form": "safetensors"}),
    "moe": ("moe", {"stages": "moe_router_indices,moe_expert_out", "layers": "0"}),
}


@pytest.fixture(params=CASES)
def run(request, zoo, monkeypatch):
    """A function that dumps into a folder, in blocks where the case says so."""
    name, options = CASES[request.param]
    if request.param == "blocks":
        monkeypatch.setattr(model, "SCORES_IN_BLOCK", 60)  # of 6 heads, 5 keys: two query rows
    return partial(write_tree, zoo(name), tokens=TOKENS, **options)


def crashed(folder: Path, at: int, run) -> bool:
    """Run with a crash at the N-th event; False where the run ended before it."""
    disk = Disk(folder, at, freeze)
    with disk.watched():
        if not disk_survived(disk, lambda: run(output=folder)):
            return True
    return False


def disk_survived(disk: Disk, run) -> bool:
    try:
        run()
    except Crash:
        assert disk.struck
        return False
    assert not disk.struck
    return True


def test_a_kill_at_any_moment_leaves_an_honest_folder_that_the_same_command_finishes(tmp_path: Path, run) -> None:
    put_foreign(tmp_path / "whole")
    run(output=tmp_path / "whole")
    whole, folder = contents(tmp_path / "whole"), tmp_path / "tree"
    for at in itertools.count():
        put_foreign(folder)
        if not crashed(folder, at, run):
            break
        check_honest(folder, whole)
        if (folder / UNFINISHED).exists():
            with pytest.raises(UserError, match=r"another dump \(tokens differ\)"):
                run(output=folder, tokens=[1])
        run(output=folder)
        assert contents(folder) == whole
        shutil.rmtree(folder)
    assert at > 20
    assert contents(folder) == whole
    run(output=folder)  # over a finished tree
    assert contents(folder) == whole


def test_a_kill_while_stages_are_added_leaves_the_finished_tree_whole(tmp_path: Path, zoo) -> None:
    run = partial(write_tree, zoo("qwen2"), tokens=TOKENS, layers="1")
    for folder in ("whole", "first"):
        put_foreign(tmp_path / folder)
        run(output=tmp_path / folder, stages="attn_norm")
    first = contents(tmp_path / "first")[MANIFEST]
    run(output=tmp_path / "whole", stages="attn_norm,attn_out")
    whole, folder = contents(tmp_path / "whole"), tmp_path / "tree"
    for at in itertools.count():
        shutil.copytree(tmp_path / "first", folder)
        if not crashed(folder, at, partial(run, stages="attn_norm,attn_out")):
            break
        check_honest(folder, whole)
        assert contents(folder)[MANIFEST] in (first, whole[MANIFEST])
        run(output=folder, stages="attn_norm,attn_out")
        assert contents(folder) == whole
        shutil.rmtree(folder)
    assert at > 20


@pytest.mark.parametrize("case", ["aprt", "blocks"])
def test_a_real_kill_does_the_same(tmp_path: Path, case: str) -> None:
    kills, _ = run_case(case, tmp_path, every=150, first=40)
    assert kills >= 1
