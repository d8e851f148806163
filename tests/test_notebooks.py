"""The notebooks run whole, are what their text form says, and hold nothing of the machine that ran them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the notebooks extra: pip install 'jaxref[notebooks]'")
pytest.importorskip("nbclient", reason="needs the notebooks extra: pip install 'jaxref[notebooks]'")

import nbformat  # noqa: E402

from notebooks.run import PERCENT, execute, sources  # noqa: E402

PAIRS = [(source, source.with_suffix(".ipynb")) for source in sources()]
pairs = pytest.mark.parametrize(("source", "stored"), PAIRS, ids=lambda path: path.name)


def test_there_are_three() -> None:
    assert [source.name[:2] for source in sources()] == ["01", "02", "03"]
    assert [stored for _, stored in PAIRS] == sorted(PAIRS[0][1].parent.glob("*.ipynb"))


@pairs
def test_a_notebook_is_its_text_form(source: Path, stored: Path) -> None:
    text, kept = jupytext.read(source, fmt=PERCENT), nbformat.read(stored, 4)
    assert [cells(cell) for cell in text.cells] == [cells(cell) for cell in kept.cells], "run python -m notebooks.run"
    nbformat.validate(kept)


def cells(cell: Any) -> tuple[str, str]:
    return cell.cell_type, cell.source


@pairs
def test_a_notebook_runs_and_says_what_is_stored(source: Path, stored: Path) -> None:
    fresh, kept = execute(source), nbformat.read(stored, 4)
    for new, old in zip(fresh.cells, kept.cells, strict=True):
        ours, theirs = ([shown(output) for output in cell.get("outputs", [])] for cell in (new, old))
        assert ours == theirs, "run python -m notebooks.run"


def shown(output: Any) -> tuple[str, list[str], list[str]]:
    """The kind of an output, its media and its words; digits may differ from processor to processor."""
    data = output.get("data", {})
    text = output.get("text", "") + data.get("text/plain", "")
    return output.output_type, sorted(data), re.findall(r"[a-z_]{3,}", text)


@pairs
def test_what_is_stored_is_small_and_anyones(source: Path, stored: Path) -> None:
    assert stored.stat().st_size < 300_000
    outputs = [output for cell in nbformat.read(stored, 4).cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.get("name") != "stderr"
        said = output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text/"))
        assert not re.search(r"/home/|/tmp/|/root/|/work/|/Users/", said)
        assert not re.search(r"\b\d[\d.]* ?(s|ms|µs|min|seconds)\b", said), said
        assert not re.search(r"0x[0-9a-f]{6,}|\b20\d\d-\d\d-\d\d\b", said), said
