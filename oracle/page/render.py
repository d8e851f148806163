"""Sheet → HTML, by the templates beside this file; whatever a tree says about itself is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oracle.page import palette
from oracle.page.sheet import Sheet
from oracle.trees import path_of


def page_of(sheet: Sheet) -> str:
    """The whole page: one file that asks nothing of a network."""
    details = {path_of(cell.key): dict(cell.details) for cell in sheet.cells}
    return _render("page.html.jinja", sheet, details=details)


def fragment_of(sheet: Sheet) -> str:
    """The verdict and the map alone, to stand in a notebook; no script."""
    return _render("fragment.html.jinja", sheet)


def _render(template: str, sheet: Sheet, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("oracle.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"path_of": path_of, "compact": _compact}
    environment.globals |= {
        "asset": _asset,
        "light": Markup(palette.variables(palette.LIGHT)),
        "dark": Markup(palette.variables(palette.DARK)),
    }
    cells = {cell.key: cell for cell in sheet.cells}
    rows = [(layer, [cells.get((layer, stage)) for stage in sheet.stages]) for layer in sheet.layers]
    return environment.get_template(template).render(sheet=sheet, rows=rows, Markup=Markup, **more)


def _asset(name: str) -> Markup:
    """A file of ours beside this one, as it is."""
    return Markup((files("oracle.page") / name).read_text(encoding="utf-8"))


def _compact(value: Any) -> str:
    """A value of a manifest on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_compact(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
