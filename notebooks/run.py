"""Notebooks are written as .py files; this runs them and writes the .ipynb: `python -m notebooks.run [NAME…]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
PERCENT = "py:percent"
SECONDS = 110  # for one cell
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """The text form of every notebook."""
    return sorted(HERE.glob("[0-9]*.py"))


def execute(source: Path) -> Any:
    """Run a notebook's text form whole, in a kernel of its own in the project's folder; return it with its outputs.

    Raises `CellExecutionError` where a cell fails.
    """
    notebook = jupytext.read(source, fmt=PERCENT)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # else what one cell prints is in as many parts as the kernel happens to flush
        resources={"metadata": {"path": str(HERE.parent)}},
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _needs_script(output)]
    return notebook


def _needs_script(output: Any) -> bool:
    """HTML that is large, and blank wherever notebooks are shown without running them; it is not stored."""
    return "<script" in output.get("data", {}).get("text/html", "")


def write(source: Path) -> Path:
    """Run a notebook and write it, outputs and all, beside its text form."""
    target = source.with_suffix(".ipynb")
    nbformat.write(execute(source), target)
    return target


def main() -> None:
    """Run all notebooks, or those whose names begin as given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="how a notebook's name begins, like 01")
    names = parser.parse_args().names
    for source in sources():
        if not names or source.name.startswith(tuple(names)):
            try:
                print(write(source))
            except CellExecutionError as error:
                raise SystemExit(f"{source}: {error}") from None


if __name__ == "__main__":
    main()
