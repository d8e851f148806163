"""The documentation holds: generated pages are what their generator gives, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
