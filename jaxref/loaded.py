"""A dumped tree for notebooks: `load_tree("trace")["layer-3"]["q_post_rope"]` is an array that knows its axes."""

from __future__ import annotations

import math
import re
import stat
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxref.aprt import open_aprt
from jaxref.named import Named
from jaxref.named_tree import NamedTree, Open, canonical
from jaxref.npy import open_npy
from jaxref.one_file import ONE_FILE, open_one_file
from jaxref.safetensors_stages import open_safetensors
from jaxref.stage_file import SHOWN
from jaxref.tree import MANIFEST, UNFINISHED, read_manifest
from weights import UserError
from weights.errors import brief, plain
from weights.safetensors_file import MOST_AXES

# Files whose place alone says of which layer they are.
PLACED = {".safetensors": open_safetensors, ".npy": open_npy}
FORMS = (".bin", *PLACED)  # what is read in a tree
_LAYER = re.compile(r"layer-([0-9]{1,9})")
_NAME = re.compile(r"(?:layer-([0-9]{1,9})/)?(.+)")


class LoadedTree(NamedTree):
    """A tree in a folder; its files are mapped when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_folder(folder)
        manifest = stated_by(folder)
        if manifest is None and (folder / UNFINISHED).exists():
            raise UserError(f"{folder}: its dump was not finished; run the same dump again")
        stated = (manifest or {}).get("files", [])
        self._entries = {str(entry.get("path")): entry for entry in stated if isinstance(entry, dict)}
        found: dict[int | None, dict[str, Path]] = {None: _stage_files(folder)}
        for index, path in _layer_folders(folder):
            if files := _stage_files(path):
                if index in found:
                    raise UserError(f"{folder}: layer-{index} and {path.name} are the same layer; remove one of them")
                found[index] = files
        if not any(found.values()):
            raise UserError(f"{folder}: holds no stage's file, like layer-0/attn_norm.bin")
        opens = {n: {name: partial(self.open, n, name, path) for name, path in found[n].items()} for n in found}
        super().__init__(str(folder), manifest, opens, folder)

    def open(self, layer: int | None, stage: str, path: Path) -> Named:
        """The tensor of a file, in the shape that the manifest gives it. Raises `UserError` for a broken one."""
        values = _mapped(path, layer, stage)
        entry = self._entries.get(path.relative_to(self.folder).as_posix(), {})
        name = stage if layer is None else f"layer-{layer}/{stage}"
        if "shape" not in entry:
            return Named(name, values, None, {})
        shape, axes = entry["shape"], entry.get("axes")
        whole = isinstance(shape, list) and len(shape) <= MOST_AXES and all(type(n) is int and n >= 0 for n in shape)
        named = axes is None or (isinstance(axes, list) and len(axes) == len(shape if whole else ()))
        if not (whole and named and math.prod(shape) == values.size):
            stated = f"shape {brief(shape)}, axes {brief(axes)}"
            raise UserError(f"{path}: holds {values.size} values, and {MANIFEST} says {stated}")
        figures = {key: entry[key] for key in SHOWN if isinstance(entry.get(key), float)}
        return Named(name, values.reshape(shape), None if axes is None else tuple(map(str, axes)), figures)


def load_tree(folder: str | Path) -> NamedTree:
    """Open a dumped tree of any producer, a folder or one `.safetensors` or `.npz` file; tensors are mapped
    when asked for.

    A tensor whose file is written later shows the new values or a mixture, and one whose file is cut ends the process
    (SIGBUS), as with any map. Of a tree that its engine may write again, keep copies: `np.array(tree["lm_head"])`. A
    file that is replaced or removed (as `dump` does) leaves them as they were. The commands of `oracle` read the files
    and end in one line. Raises `UserError` for a folder that holds no tree, and for what is not in it, with a list of
    what is.
    """
    path = Path(folder)
    return _loaded_file(path) if path.suffix in ONE_FILE and path.is_file() else LoadedTree(path)


def _loaded_file(path: Path) -> NamedTree:
    """The tensors of one file, called like `layer-0/attn_norm`, in their own shapes."""
    opens: dict[int | None, dict[str, Open]] = {}
    for name in open_one_file(path, wanted=lambda name: False):
        found = _NAME.fullmatch(name)
        if found is None:
            raise UserError(f"{path}: {brief(name)} is no name of a tensor")
        layer, stage = None if found[1] is None else int(found[1]), canonical(found[2])
        if stage in opens.setdefault(layer, {}):
            raise UserError(f"{path}: {brief(name)} and another name are the same stage; remove one of them")
        opens[layer][stage] = partial(_one_of, path, name)
    return NamedTree(str(path), None, opens, path)


def _one_of(path: Path, name: str) -> Named:
    """One tensor of a file of several; the others may be of any type."""
    found = open_one_file(path, wanted=lambda each: each == name).get(name)
    if found is None:
        raise UserError(f"{path}: no longer holds {brief(name)}")
    return Named(name, np.asarray(found.map()), None, {})


def inside(folder: Path) -> list[Path]:
    """What a folder holds, in order: nothing where it is a file or a link to nothing.

    Raises `UserError` for one that cannot be read: it must not count as empty.
    """
    try:
        return sorted(folder.iterdir())
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def stated_by(folder: Path) -> dict[str, Any] | None:
    """The manifest of a tree, None where there is none. Raises `UserError` as `read_manifest`, and says what to do."""
    try:
        return read_manifest(folder)
    except UserError as error:
        advice = f"if another program wrote it, move {MANIFEST} away, and the tree is read as bare files"
        raise UserError(f"{error}; {advice}") from None


def _check_folder(folder: Path) -> None:
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no such folder; `python -m jaxref dump MODEL --output {folder}` makes one"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise UserError(
            f"{folder}: is a file, and a tree is a folder, or one {' or '.join(ONE_FILE)} file of all tensors"
        )


def _layer_folders(folder: Path) -> list[tuple[int, Path]]:
    found = ((_LAYER.fullmatch(path.name), path) for path in inside(folder))
    return sorted((int(name[1]), path) for name, path in found if name)


def _stage_files(folder: Path) -> dict[str, Path]:
    """Stage → file of one folder; a name that is no stage is kept as it is."""
    found: dict[str, Path] = {}
    for path in inside(folder):
        if path.name.startswith(".") or path.suffix not in FORMS:
            continue
        name = canonical(path.stem)
        if name in found:
            names = f"{plain(found[name].name)} and {plain(path.name)}"
            raise UserError(f"{folder}: {names} are the same stage; remove one of them")
        found[name] = path
    return found


def _mapped(path: Path, layer: int | None, stage: str) -> np.ndarray:
    """The values of an APRT (flat), .npy or safetensors file (in its own shape)."""
    if path.suffix in PLACED:
        return np.asarray(PLACED[path.suffix](path).map())
    stated, values = open_aprt(path)
    # An engine may call the embedding a stage of layer 0 or of the whole model; nothing else is ambiguous.
    if stated != layer and stage != "embedding":
        header, place = ("whole-model" if n is None else n for n in (stated, layer))
        raise UserError(f"{path}: its header says layer {header}, its place says {place}")
    return np.asarray(values.map())
