"""The notebooks run whole, are what their text form says, and hold nothing of the machine that ran them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the notebooks extra: pip install 'jaxref[notebooks]'")
pytest.importorskip("nbclient", reason="needs the notebooks extra: pip install 'jaxref[notebooks]'")

import nbformat  # noqa: E402

from notebooks.run import execute, sources  # noqa: E402

PAIRS = [(source, source.with_suffix(".ipynb")) for source in sources()]


def test_there_are_three() -> None:
    assert [source.name[:2] for source in sources()] == ["01", "02", "03"]


@pytest.mark.parametrize(("source", "stored"), PAIRS, ids=lambda path: path.name)
def test_a_notebook_runs_and_says_what_is_stored(source: Path, stored: Path) -> None:
    fresh, kept = execute(source), nbformat.read(stored, 4)
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in kept.cells]
    for new, old in zip(fresh.cells, kept.cells, strict=True):
        assert len(new.get("outputs", [])) == len(old.get("outputs", []))
        for ours, theirs in zip(new.get("outputs", []), old.get("outputs", []), strict=True):
            assert ours.output_type == theirs.output_type
            # Digits beyond the second may differ from processor to processor.
            assert _words(ours.get("text", "")) == _words(theirs.get("text", ""))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z_]{3,}", text)


@pytest.mark.parametrize(("source", "stored"), PAIRS, ids=lambda path: path.name)
def test_what_is_stored_is_small_and_anyones(source: Path, stored: Path) -> None:
    text = stored.read_text()
    assert len(text) < 300_000
    assert not re.search(r"/home/|/tmp/|/root/|/work/", text)
