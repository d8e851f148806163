"""One self-contained HTML page of what was found: `write_html` of a compare, `write_sheet` of anything else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from oracle.output import check_output, legible, whole

if TYPE_CHECKING:
    from oracle.explain import Explained
    from oracle.page.sheet import Sheet
    from oracle.result import Result

_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)


def check_html(path: Path) -> None:
    """Raise `UserError` where no page could be written, or only in another file's place; before anything long."""
    from oracle.plots import need_matplotlib

    need_matplotlib()
    check_output(path, "page", "report.html", _PAGE)


def write_html(result: Result, path: Path) -> None:
    """Write the page of a compare. Raises `UserError` where it cannot be written."""
    check_html(path)
    from oracle.page.compare import experts_of, sheet_of
    from oracle.page.pairs import Pairs
    from oracle.page.pictures import pictures_of

    pairs = Pairs(result)
    sheet = replace(sheet_of(result), pictures=pictures_of(result, pairs), listings=experts_of(pairs))
    write_sheet(sheet, path)


def write_told(told: Explained, path: Path) -> None:
    """Write the page of a localize or explain. Raises `UserError` where it cannot be written."""
    check_html(path)
    from oracle.page.replayed import sheet_of_told

    write_sheet(sheet_of_told(told), path)


def write_sheet(sheet: Sheet, path: Path) -> None:
    """Write any page, whole or not at all; the staircase of its lines comes first."""
    check_html(path)
    from oracle.page.pictures import staircase_of
    from oracle.page.render import page_of

    if sheet.lines:
        sheet = replace(sheet, pictures=[staircase_of(sheet.lines), *sheet.pictures])
    with whole(path) as temporary:
        temporary.write_text(legible(page_of(sheet)), encoding="utf-8")
