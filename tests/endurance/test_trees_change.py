"""A tree that its engine cuts, writes over, replaces or removes while it is compared, localised or explained."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import oracle.diff
from oracle import compare, layouts
from oracle.explain import explain
from oracle.localize import localize
from oracle.metrics import Sums
from oracle.page.pairs import Pairs
from oracle.tensor_file import open_tensor
from oracle.trees import Tree
from tests.endurance.test_weights_change import replace, write_over
from tests.trees import write_tree
from weights import UserError, open_checkpoint

TOKENS = [54, 71, 64, 83, 220]
FORMS = {"aprt": "bin", "safetensors": "safetensors"}


def cut(path: Path) -> None:
    """To nothing: each page of a map of it would end the process."""
    path.write_bytes(b"")


CHANGES: dict[Callable[[Path], object], str] = {
    cut: r"changed while it was in use \([\d,]+ bytes then, 0 now\)",
    write_over: "changed while it was in use; run again",
    replace: "changed while it was in use; run again",
    Path.unlink: "is gone since it was opened: No such file",
}


@pytest.fixture(scope="module", params=FORMS)
def stored(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with `reference` and `test`, and the suffix of their files."""
    root = tmp_path_factory.mktemp("trees")
    for name, dtype in (("reference", "float64"), ("test", "float32")):
        write_tree(zoo("qwen2"), root / name, TOKENS, dtype=dtype, form=request.param)
    return root, FORMS[request.param]


@pytest.fixture
def trees(stored: tuple[Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """One's own copy, and the file that will change: of a stage that is opened once, when it is read."""
    shutil.copytree(stored[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "test" / "layer-1" / f"ffn_up.{stored[1]}"


def after_opening(monkeypatch: pytest.MonkeyPatch, file: Path, change: Callable[[Path], object]) -> list[Path]:
    """Change a file when it was opened by its stage and nothing of it was read yet; tells that it happened."""
    opened, done = Tree.open, []

    def changing(self: Tree, key):
        found = opened(self, key)
        if found.path == file and not done:
            done.append(file)
            change(file)
        return found

    monkeypatch.setattr(Tree, "open", changing)
    return done


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_compare_between_opening_and_reading(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    root, file = trees
    done = after_opening(monkeypatch, file, change)
    with pytest.raises(UserError, match=f"^{file}: {CHANGES[change]}"):
        compare(root / "reference", root / "test")
    assert done


@pytest.mark.parametrize("command", [localize, explain], ids=lambda command: command.__name__)
@pytest.mark.parametrize("change", [cut, write_over], ids=lambda change: change.__name__)
def test_localize_and_explain_too(
    trees: tuple[Path, Path],
    zoo,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    command: Callable[..., object],
) -> None:
    root, file = trees
    done = after_opening(monkeypatch, file, change)
    with pytest.raises(UserError, match=f"^{file}: {CHANGES[change]}"):
        command(open_checkpoint(zoo("qwen2")), root / "test")
    assert done


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_compare_in_the_midst_of_a_file(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    """When some of its blocks are in the sums already: no figure is of both contents."""
    root, file = trees
    add, done = Sums.add, []

    def changing(self: Sums, *block) -> None:
        add(self, *block)
        if not done:
            done.append(file)
            change(file)

    for name, value in (("BLOCK", 8), ("AT_ONCE", 1)):
        monkeypatch.setattr(layouts, name, value)
    monkeypatch.setattr("oracle.comparer._Comparer._comparable", lambda self: iter([(1, "ffn_up")]))
    monkeypatch.setattr(Sums, "add", changing)
    with pytest.raises(UserError, match=f"^{file}: {CHANGES[change]}"):
        compare(root / "reference", root / "test")
    assert done


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_before_its_turn_belongs_to_another_run(
    trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    """An engine that runs again: what was read already is of the run before."""
    root, file = trees
    monkeypatch.setattr("oracle.comparer.recognise", lambda tree: change(file) if tree.role == "test" else None)
    with pytest.raises(UserError, match=f"^{file}: {CHANGES[change]}"):
        compare(root / "reference", root / "test")


def test_what_a_page_draws_is_what_was_compared(trees: tuple[Path, Path]) -> None:
    root, file = trees
    result = compare(root / "reference", root / "test")
    assert Pairs(result).pair((1, "ffn_up"), "test") is not None
    write_over(file)
    with pytest.raises(UserError, match=f"^{file}: changed"):
        Pairs(result).pair((1, "ffn_up"), "test")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_diff(trees: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]) -> None:
    root, file = trees

    def changing(path: Path):
        found = open_tensor(path)
        if path == file:
            change(path)
        return found

    monkeypatch.setattr(oracle.diff, "open_tensor", changing)
    with pytest.raises(UserError, match=f"^{file}: {CHANGES[change]}"):
        oracle.diff.diff(file, root / "reference" / "layer-1" / file.name)


CUTTING = """
import sys
from pathlib import Path
from oracle.__main__ import main
from oracle.trees import Tree
from weights.cli import run

file, opened = Path(sys.argv.pop(1)), Tree.open

def cutting(self, key):
    found = opened(self, key)
    if found.path == file:
        file.write_bytes(b"")
    return found

Tree.open = cutting
run(main)
"""


@pytest.mark.parametrize("command", ["compare", "localize"])
def test_a_process_ends_in_one_line(trees: tuple[Path, Path], zoo, command: str) -> None:
    """With a map it would be SIGBUS: no line, no exit code."""
    root, file = trees
    first = root / "reference" if command == "compare" else zoo("qwen2")
    words = [sys.executable, "-c", CUTTING, file, command, first, root / "test"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done
    assert done.stderr.startswith(f"error: {file}: changed while it was in use")


def test_no_file_is_held_open(trees: tuple[Path, Path]) -> None:
    """A tree of many layers has more files than a process may open."""
    descriptors = Path("/proc/self/fd")
    tree = Tree(trees[0] / "test", "test")
    before = len(list(descriptors.iterdir()))
    files = [tree.open(key) for key in tree.files]
    assert len(list(descriptors.iterdir())) == before
    assert all(file.values[:1].size == 1 for file in files)
