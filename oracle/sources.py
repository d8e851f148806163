"""Where the tensors of a tree lie: a folder of files, one file of them all, or arrays in memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxref.loaded import FORMS, inside, stated_by
from jaxref.named_tree import NamedTree
from jaxref.one_file import ONE_FILE, open_one_file
from jaxref.stages import Key, stage_named
from jaxref.tree import MANIFEST, UNFINISHED, stage_path
from oracle.module_names import is_module, stages_of_modules
from oracle.seems import holds_stages, meant, seems
from oracle.tensor_file import LAYER_FOLDER, TensorFile, open_tensor
from weights import UserError
from weights.errors import brief, listed, plain
from weights.extent import Extent
from weights.safetensors_file import DTYPES, WHOLE
from weights.watched import Version

Given = str | Path | Mapping[str, Any]  # a folder, one file of all, arrays by name, a tree of jaxref's
_NAME = re.compile(r"(?:layer-([0-9]{1,9})/)?([^/]+)")
_ADVICE = {
    (".zip", ".gz", ".tgz", ".tar", ".zst", ".xz", ".bz2", ".7z"): "unpack it and give the folder",
    (".pt", ".pth", ".pkl", ".ckpt"): "save the dictionary with safetensors.torch.save_file",
}
_NUMBERS = {*DTYPES.values(), *WHOLE.values()}


class Source(Protocol):
    """The tensors of one tree, and its manifest if it has one.

    `folder` is how messages call it, `files` where each stage lies, for messages too. `unseen`: stages that no
    module gives, where the tensors are called as modules are.
    """

    folder: Path
    unseen: frozenset[str]
    manifest: dict[str, Any] | None
    files: dict[Key, Path]
    unknown: list[str]

    def open(self, key: Key) -> TensorFile:
        """The tensor of a stage. Raises `UserError` where it is broken, or changed since the tree was opened."""
        ...


def source_of(given: Given, role: str) -> Source:
    """What is given as a tree. Raises `UserError` for what is none, or holds no stage."""
    if isinstance(given, NamedTree) and given.path is not None:
        given = given.path  # read as it lies there, and checked while it is
    if isinstance(given, Mapping):
        return Arrays(given, Path(f"{role} arrays"))
    path = Path(given)
    if not path.exists():
        kind = "file" if path.suffix in ONE_FILE else "folder"
        raise UserError(f"{path}: no such {kind} (the {role} tree)")
    if path.is_dir():
        return Folder(path)
    if path.suffix in ONE_FILE:
        return OneFile(path)
    advice = next((words for kinds, words in _ADVICE.items() if path.suffix in kinds), "`oracle diff` compares files")
    words = f"a folder, or one {' or '.join(ONE_FILE)} file with names like layer-0/attn_norm"
    raise UserError(f"{path}: is a file, and the {role} tree is {words}; {advice}")


class Folder:
    """A folder with a file for each tensor, as `dump` and the engines write it."""

    unseen = frozenset[str]()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / UNFINISHED).exists() and not (folder / MANIFEST).exists():
            raise UserError(f"{folder}: its dump was not finished; run the same dump again")
        self.unknown: list[str] = []
        self._versions: dict[Key, Version] = {}
        self.files = self._find()
        self._check_layers()
        if not self.files:
            known = ", ".join(f"layer-0/attn_norm{suffix}" for suffix in FORMS)
            words = f"holds no stage's file (like {known}), so there is nothing to compare"
            raise UserError(f"{folder}: {words}{seems(folder)}")
        self.manifest = stated_by(folder)

    def _find(self) -> dict[Key, Path]:
        found: dict[Key, Path] = {}
        for layer, path in self._paths():
            if path.suffix not in FORMS or path.name.startswith("."):
                continue
            try:
                key = (layer, stage_named(path.stem).name)
            except UserError:
                self.unknown.append(plain(path.relative_to(self.folder)))
                continue
            if key in found:
                names = f"{plain(found[key].name)} and {plain(path.name)}"
                raise UserError(f"{self.folder}: {names} of {_where(key)} are the same stage")
            found[key] = path
            with suppress(OSError):  # a link to nothing is an error when it is read
                self._versions[key] = Version.of(path.stat())
        return found

    def _paths(self) -> Iterator[tuple[int | None, Path]]:
        """What lies in the folder and in those of its layers, and in which layer."""
        there = inside(self.folder)
        yield from ((None, path) for path in there)
        for folder in there:
            if found := LAYER_FOLDER.fullmatch(folder.name):
                yield from ((int(found[1]), path) for path in inside(folder))

    def _check_layers(self) -> None:
        """Refuse layers in folders of another spelling; where some are spelled right, the others are `unknown`."""
        others = [path for path in inside(self.folder) if not LAYER_FOLDER.fullmatch(path.name) and holds_stages(path)]
        if others and all(layer is None for layer, _ in self.files):
            words = f"the stages of {listed(path.name for path in others[:3])} are not read"
            raise UserError(f"{self.folder}: {words}: layers are the folders layer-0, layer-1, … in it; rename them")
        self.unknown += [plain(path.name) for path in others]

    def open(self, key: Key) -> TensorFile:
        """The file of a stage. Raises `UserError` where its header names another layer, too."""
        layer, file = open_tensor(self.files[key], self._versions.get(key))
        # An engine may write layer 0 or "whole model" for the embedding; nothing else is ambiguous.
        if layer != key[0] and key[1] != "embedding":
            header, place = ("whole-model" if n is None else n for n in (layer, key[0]))
            raise UserError(f"{file.path}: its header says layer {header}, its place says {place}")
        return file


class Named:
    """Tensors that are known by names like `layer-0/attn_norm` and `lm_head`, or those of the modules that gave them.

    Of all others the names alone count.
    """

    def __init__(self, tensors: Mapping[str, Any], folder: Path, manifest: dict[str, Any] | None = None) -> None:
        self.folder, self.manifest, self.unknown = folder, manifest, list[str]()
        self.files: dict[Key, Path] = {}
        self._parts: dict[Key, list[Extent | np.ndarray]] = {}
        self.unseen = frozenset[str]()
        modules, unseen = stages_of_modules(tensors, folder)
        for name, values in tensors.items():
            key = _key_of(name)
            if key is not None and key in self.files:
                raise UserError(f"{folder}: {brief(name)} and another name are the same stage of {_where(key)}")
            if key is not None:
                self._take(key, {name: values})
            elif not (modules and is_module(name.partition("/")[0])):
                self.unknown.append(plain(name))
        for key, names in modules.items():
            if key not in self.files:
                self._take(key, {name: tensors[name] for name in names})
                self.unseen = unseen  # where all stages have their own names, none is excused
        if not self.files:
            words = "holds no stage's tensor (called like layer-0/attn_norm), so there is nothing to compare"
            raise UserError(f"{folder}: {words}{_hint(list(tensors))}")

    def _take(self, key: Key, parts: Mapping[str, Any]) -> None:
        self.files[key] = self.folder / next(iter(parts))
        self._parts[key] = [x if isinstance(x, Extent) else array_of(x, self.folder / n) for n, x in parts.items()]

    def open(self, key: Key) -> TensorFile:
        """The tensor of a stage; of several modules side by side. Raises `UserError` where these have other rows."""
        values = self._parts[key][0]
        if len(self._parts[key]) > 1:
            rows = [np.asarray(part).reshape(-1, (part.shape or (1,))[-1]) for part in self._parts[key]]
            if len({len(each) for each in rows}) > 1:
                shapes = " and ".join(str(list(part.shape)) for part in self._parts[key])
                raise UserError(f"{self.files[key]}: what makes {key[1]} with it has other rows: {shapes}")
            values = np.concatenate(rows, axis=1)
        return TensorFile(self.files[key], values.reshape(values.size))


class OneFile(Named):
    """All tensors in one file, as `safetensors.torch.save_file` or `numpy.savez` writes a dictionary of them."""

    def __init__(self, path: Path) -> None:
        names = open_one_file(path, wanted=lambda name: False)
        version = next((values.file.version for values in names.values()), None)
        parts = {part for parts in stages_of_modules(names, path)[0].values() for part in parts}
        wanted = parts | {name for name in names if _key_of(name) is not None}
        super().__init__(open_one_file(path, version, wanted.__contains__), path)


class Arrays(Named):
    """Arrays by name, or by layer and name as `jaxref.forward` gives them. Raises `UserError` for what is no array."""

    def __init__(self, arrays: Mapping[str, Any], folder: Path) -> None:
        super().__init__(dict(_flat(arrays)), folder, arrays.manifest if isinstance(arrays, NamedTree) else None)


def _flat(arrays: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, values in arrays.items():
        if isinstance(values, Mapping):
            yield from ((f"{name}/{inner}", value) for inner, value in values.items())
        else:
            yield str(name), values


def array_of(values: Any, name: Path) -> np.ndarray:
    """What is given as an array, torch's too, as NumPy's. Raises `UserError` where it holds no numbers."""
    try:
        found = np.asarray(_of_torch(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: NumPy makes no array of it: {plain(error)}") from None
    if found.dtype not in _NUMBERS or not found.size:
        raise UserError(f"{name}: {list(found.shape)} {found.dtype}; floats or integers were expected")
    return found


def _of_torch(values: Any) -> Any:
    """A tensor of torch as one that NumPy takes: without a gradient, on the host, its bfloat16 as ml_dtypes'."""
    torch = sys.modules.get("torch")  # who hands one over has imported it
    if torch is None or not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    if values.dtype != torch.bfloat16:
        return values
    return values.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _hint(names: list[str]) -> str:
    """What names that are no stage's may mean."""
    if any(name.startswith("model.layers.") for name in names):
        return "; it looks like a model, and `python -m jaxref dump` makes a tree of one"
    for name in names:
        if (key := meant(name)) is not None:
            called = stage_path(*key).removesuffix(".bin")
            return f"; {brief(name)} seems to be {called}, and has to be called so"
    return f"; it has {brief(names[0])}" if names else ""


def _key_of(name: str) -> Key | None:
    found = _NAME.fullmatch(name)
    with suppress(UserError):
        return found and (None if found[1] is None else int(found[1]), stage_named(found[2]).name)
    return None


def _where(key: Key) -> str:
    return "the whole model" if key[0] is None else f"layer {key[0]}"
