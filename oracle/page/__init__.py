"""One self-contained HTML page of what was found: `write_html` of a compare, `write_sheet` of anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weights import UserError

if TYPE_CHECKING:
    from oracle.explain import Explained
    from oracle.page.sheet import Sheet
    from oracle.result import Result


def check_html(path: Path) -> None:
    """Raise `UserError` where no page could be written there, before anything long is begun."""
    from oracle.plots import need_matplotlib

    need_matplotlib()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file like report.html was expected")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent}: no such folder, so {path.name} cannot be written there")


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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page_of(sheet), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
