"""Two dumps into one folder at once: one writes, the other says so and leaves."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from jaxref import tree
from tests.endurance.processes import Command, ended
from tests.endurance.trees import contents
from tests.trees import write_tree
from weights import UserError


def test_the_second_is_refused_in_one_line_until_the_first_has_ended(tmp_path: Path, zoo) -> None:
    run = partial(write_tree, zoo("qwen2"), tmp_path / "tree", [1, 2, 3], layers="0..2")
    begun, goes_on = threading.Event(), threading.Event()

    def hold(layer: int) -> None:
        begun.set()
        assert goes_on.wait(60)

    first = threading.Thread(target=run, kwargs={"progress": hold})
    first.start()
    try:
        assert begun.wait(60)
        with pytest.raises(UserError, match=rf"another dump \(pid {os.getpid()}\) is writing here; wait for its end"):
            run()
        words: list[object] = ["dump", zoo("qwen2"), "--tokens", "1,2,3", "--layers", "0..2"]
        code, said = ended(words, tmp_path / "tree")
        assert (code, len(said.splitlines())) == (2, 1) and f"another dump (pid {os.getpid()})" in said
    finally:
        goes_on.set()
        first.join()
    whole = contents(tmp_path / "tree")
    run()
    assert contents(tmp_path / "tree") == whole


def test_another_dump_that_ends_before_the_lock_is_ours_is_seen(tmp_path: Path, zoo, monkeypatch) -> None:
    run = partial(write_tree, zoo("qwen2"), tmp_path / "tree", [1, 2, 3], layers="0", stages="attn_norm")
    lock = tree.locked

    def late(*arguments):
        monkeypatch.setattr(tree, "locked", lock)
        run(dtype="float64")
        return lock(*arguments)

    monkeypatch.setattr(tree, "locked", late)
    with pytest.raises(UserError, match=r"another dump \(dtype differ\)"):
        run()
    monkeypatch.setattr(tree, "locked", lock)
    whole = contents(tmp_path / "tree")
    run(dtype="float64")
    assert contents(tmp_path / "tree") == whole


@pytest.mark.parametrize("round_", range(3))
def test_a_race_of_several_ends_in_the_tree_of_one(tmp_path: Path, zoo, round_: int) -> None:
    same: list[object] = ["dump", zoo("qwen2"), "--tokens", "1,2,3", "--layers", "0..2", "--quiet"]
    other = [*same, "--dtype", "float64"]
    trees = {}
    for name, words in (("same", same), ("other", other)):
        assert ended(words, tmp_path / name) == (0, "")
        trees[name] = contents(tmp_path / name)
    racing = {name: Command(words, tmp_path / "tree") for name, words in (("same", same), ("twin", same))}
    racing["other"] = Command(other, tmp_path / "tree")
    ends = {name: command.end() for name, command in racing.items()}
    won = {"other" if name == "other" else "same" for name, (code, _) in ends.items() if code == 0}
    assert len(won) == 1
    assert contents(tmp_path / "tree") == trees[won.pop()]
    for code, said in ends.values():
        assert code in (0, 2) and len(said.splitlines()) == (1 if code else 0), said
        assert not code or "is writing here" in said or "holds another dump (dtype differ)" in said
