"""What the tests here share: the valid inputs, and copies of the folders that a test may spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fuzz.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    for name, source in {"model": world.dense, "sharded": world.sharded, "tree": world.trees["aprt"]}.items():
        shutil.copytree(source, tmp_path / name)
    shutil.copytree(world.trees["aprt"], tmp_path / "reference")
    for name in ("s/layer-0", "m"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path
