"""The documentation holds: generated pages are what their generator gives, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import jaxref
from jaxref.reference import reference
from oracle.verdict import BOUNDS, Rules

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "notebooks" / "README.md"])


def test_the_stage_reference_is_generated() -> None:
    made = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    assert made == "\n".join(reference()) + "\n", "run python -m jaxref.reference > docs/stages.md"


def test_the_bounds_of_compare_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| 2\^(-\d+) \| ([\de.-]+) \|$", page, re.MULTILINE)
    assert {dtype: float(bound) for dtype, _, bound in rows} == BOUNDS
    assert {dtype: 2.0 ** int(power) for dtype, power, _ in rows} == {name: Rules(name, name).floor for name in BOUNDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:jaxref|weights|oracle|tests|docs|notebooks)/[\w/]+\.\w+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", ["README.md", "docs/devices.md"])
def test_examples_in_python_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need another machine or an engine of the reader's excepted, which is played here."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert examples
    for code in examples:
        names = {"MODEL": "tiny", "run_my_engine": lambda prompt: engine(1.0)}
        exec(compile(code, page, "exec"), names)
        if "run_my_engine" in code:
            names["test_engine_matches_the_reference"]()
            names["run_my_engine"] = lambda prompt: engine(1.01)
            with pytest.raises(AssertionError, match="layer-2/ffn_out"):
                names["test_engine_matches_the_reference"]()


def engine(factor: float) -> tuple[list[int], dict[str, np.ndarray]]:
    """What an engine in float16 gives whose ffn_out of layer 2 is scaled."""
    tokens = [54, 71, 64, 83, 220]
    made = jaxref.make_tree("tiny", tokens, "float16")
    found = {f"{layer}/{stage}": np.array(x) for layer in list(made)[:-2] for stage, x in made[layer].items()}
    found |= {name: np.array(made[name]) for name in list(made)[-2:]}
    return tokens, found | {"layer-2/ffn_out": factor * found["layer-2/ffn_out"]}
