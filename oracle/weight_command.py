"""`python -m oracle weight`: opens a tensor and an engine's file of it, and writes what the checkpoint has."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from jaxref.aprt import aprt_header
from jaxref.loaded import PLACED
from jaxref.one_file import ONE_FILE, open_one_file
from oracle.output import check_output, whole
from oracle.tensor_file import open_tensor
from oracle.weight import AT_ONCE, Held, matrix_shape, rows_of, tensor_named
from oracle.weight_all import run_all
from oracle.weight_told import as_json, print_weight, tell
from weights import Checkpoint, UserError, open_checkpoint
from weights.errors import brief
from weights.extent import Extent

ALL = "all"


def run_weight(
    model: str, tensor: str, engine_file: Path | None, rows: str | None, output: Path | None, *, json_wanted: bool
) -> int:
    """The whole command; its exit code. Raises `UserError` for what cannot be opened, compared or written."""
    if engine_file is None and output is None:
        raise UserError("nothing to do: name ENGINE_FILE to compare with, or --output FILE for the right values")
    if engine_file is None and json_wanted:
        raise UserError("--json tells of a comparison: name ENGINE_FILE to compare with")
    checkpoint = open_checkpoint(model)
    if tensor == ALL:
        if engine_file is None or rows is not None or output is not None:
            raise UserError(f"{ALL}: goes with ENGINE_FILE, and with neither --rows nor --output")
        return run_all(checkpoint, engine_file, json_wanted=json_wanted)
    name = tensor_named(checkpoint, tensor)
    some = span(rows, matrix_shape(checkpoint.shape(name))[0])
    held = None if engine_file is None else open_held(checkpoint, name, engine_file, some, tensor)
    if output is not None:
        count, width = write_right(checkpoint, name, some, output)
        if held is None:
            print(f"{output}: {count} × {width} values of {name}, stored as {checkpoint.stored_as(name)}")
    if held is None:
        return 0
    told = tell(held)
    if json_wanted:
        print(json.dumps(as_json(told), allow_nan=False))
    else:
        print_weight(told)
    return told.exit_code


def layer_of(name: str) -> int | None:
    """The layer of a tensor, None for one of the whole model."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else None


def span(text: str | None, count: int) -> tuple[int, int] | None:
    """`START..END` (END exclusive) of `count` rows. Raises `UserError` for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,18})\s*\.\.\s*(\d{1,18})\s*", text, re.ASCII)
    start, stop = (int(found[1]), int(found[2])) if found else (0, 0)
    if not start < stop <= count:
        raise UserError(f"rows {brief(text)}: START..END within 0..{count} was expected, END exclusive")
    return start, stop


def open_held(checkpoint: Checkpoint, name: str, path: Path, rows: tuple[int, int] | None, asked: str) -> Held:
    """Read an engine's file of a tensor: all rows, the first ones, or those that are given.

    In a file of several it is found by its name, or as it was `asked` for. Raises `UserError` where there is none,
    the header names another layer, or it holds no whole rows.
    """
    values = _values(path, name, asked)
    (count, width), size = matrix_shape(checkpoint.shape(name)), int(values.size)
    first, stop = rows or (0, min(size // width, count))
    if not size or size != (stop - first) * width:
        wanted = f"rows {first}..{stop}" if rows else "it or its first rows"
        raise UserError(
            f"{path}: holds {size} values; {name} is {list(checkpoint.shape(name))}, and {wanted} were expected"
        )
    return Held(checkpoint, name, np.asarray(values[:]).reshape(-1, width), first)


def _values(path: Path, name: str, asked: str) -> Extent | np.ndarray:
    """The values of a file of one tensor, or of the one that is called so in a file of several."""
    if path.suffix in ONE_FILE:
        several = open_one_file(path, wanted={asked, name}.__contains__)
        if len(several) > 1 or path.suffix not in PLACED:
            found = next((several[each] for each in (asked, name) if each in several), None)
            if found is None:
                near = brief((get_close_matches(name, several, 1, 0) or [""])[0])
                raise UserError(f"{path}: none of its {len(several)} tensors is called {name}; there is {near}")
            return found.reshape(found.size)
    layer, file = open_tensor(path)
    if layer is not None and layer != layer_of(name):
        raise UserError(f"{path}: its header says layer {layer}, and {name} is another's")
    return file.values


def write_right(checkpoint: Checkpoint, name: str, rows: tuple[int, int] | None, path: Path) -> tuple[int, int]:
    """Write rows of a tensor as the checkpoint has them, as APRT; how many, and their width.

    Raises `UserError` where the file cannot be written, or is there: it may be an engine's.
    """
    check_output(path, "empty file", "weight.bin", re.compile(b"(?!)"))
    count, width = matrix_shape(checkpoint.shape(name))
    start, stop = rows or (0, count)
    step = max(1, AT_ONCE // width)
    with whole(path) as temporary, temporary.open("wb") as file:
        file.write(aprt_header(layer_of(name), (stop - start, width)))
        for row in range(start, stop, step):
            file.write(rows_of(checkpoint, name, row, min(row + step, stop)).astype("<f4").tobytes())
    return stop - start, width
