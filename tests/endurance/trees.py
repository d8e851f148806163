"""What must hold of a folder whatever happened to the dump that wrote there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from jaxref.loaded import load_tree
from jaxref.tree import MANIFEST, UNFINISHED
from oracle.trees import Tree
from weights import UserError

FOREIGN = {"notes.txt": b"mine", "layer-0/x.bin": b"an engine's"}


def put_foreign(folder: Path) -> None:
    """Files of somebody else, to be left as they are."""
    for name, data in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_honest(folder: Path, whole: dict[str, bytes]) -> None:
    """Nothing half-written passes for whole; `whole` is what the finished folder holds."""
    found = contents(folder)
    assert {name: found.get(name) for name in FOREIGN} == FOREIGN
    shown = {name: data for name, data in found.items() if not Path(name).name.startswith(".") and name != MANIFEST}
    assert shown == {name: whole[name] for name in shown}
    if MANIFEST in found:
        for entry in json.loads(found[MANIFEST])["files"]:
            assert hashlib.sha256(found[entry["path"]]).hexdigest() == entry["sha256"]
    elif UNFINISHED in found:
        for read in (load_tree, lambda path: Tree(path, "test")):
            with pytest.raises(UserError, match="not finished"):
                read(folder)
    else:
        assert set(shown) == set(FOREIGN)
