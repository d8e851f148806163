"""A tree of tensor files, opened lazily: which stages it has, whose they are, and each as a flat array in its file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxref.aprt import open_aprt, open_safetensors
from jaxref.stages import STAGES, Key, stage_named
from jaxref.tree import MANIFEST, SUFFIXES, UNFINISHED, read_manifest, stage_path
from weights import Config, UserError
from weights.errors import brief, plain
from weights.extent import Extent
from weights.watched import Version

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (*DTYPES, "q8")
_LAYER = re.compile(r"layer-([0-9]{1,9})")
_FORMS = {f".{suffix}": form for form, suffix in SUFFIXES.items()}
_SAMPLE = 1 << 16  # values of a file that are looked at to guess the dtype


@dataclass(frozen=True)
class TensorFile:
    """One tensor of a tree."""

    path: Path
    values: Extent | np.ndarray  # [dim_product], in the dtype on disk; read when they are indexed


def open_tensor(path: Path, version: Version | None = None) -> tuple[int | None, TensorFile]:
    """An APRT or safetensors file: its layer (None: whole model) and its values.

    Raises `UserError` where it is missing, is no such file, is longer or shorter than its header says, or is no longer
    of `version`; and at each reading where it has changed.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file was expected")
    if path.suffix != ".safetensors":
        layer, values = open_aprt(path, version)
        return layer, TensorFile(path, values)
    values = open_safetensors(path, version)
    return _safetensors_layer(path), TensorFile(path, values.reshape(values.size))


def _safetensors_layer(path: Path) -> int | None:
    found = _LAYER.fullmatch(path.absolute().parent.name)
    return int(found[1]) if found else None


class Tree:
    """The folder of one run. `role` ("reference", "test", "yardstick") is how messages call it.

    `positions` are those of the rows, for a producer that writes no manifest. Each file is read as it lies there now:
    once it is changed, reading it raises `UserError`, so that no figure is of two runs. Raises `UserError` for a folder
    that holds no stage, one that cannot be read, or a broken manifest.
    """

    def __init__(self, folder: str | Path, role: str, positions: tuple[int, ...] | None = None) -> None:
        self.folder, self.role, self._positions = Path(folder), role, positions
        if not self.folder.exists():
            raise UserError(f"{self.folder}: no such folder (the {role} tree)")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file, and the {role} tree is a folder; `oracle diff` compares files")
        if (self.folder / UNFINISHED).exists() and not (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder}: its dump was not finished; run the same dump again")
        self.manifest = read_manifest(self.folder)
        self.unknown: list[str] = []
        self._versions: dict[Key, Version] = {}
        self.files = self._find()
        if not self.files:
            known = ", ".join(f"layer-0/attn_norm.{suffix}" for suffix in SUFFIXES.values())
            raise UserError(f"{self.folder}: holds no stage's file (like {known}), so there is nothing to compare")
        self.config = self._config()
        self.tokens = self._tokens()

    def _find(self) -> dict[Key, Path]:
        found: dict[Key, Path] = {}
        for layer, path in self._paths():
            if path.suffix not in _FORMS or path.name.startswith("."):
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
        inside = _listed(self.folder)
        yield from ((None, path) for path in inside)
        for folder in inside:
            if found := _LAYER.fullmatch(folder.name):
                yield from ((int(found[1]), path) for path in _listed(folder))

    def _config(self) -> Config | None:
        stated = (self.manifest or {}).get("config")
        if stated is None:
            return None
        try:
            return Config.from_json(stated)
        except UserError as error:
            raise UserError(f"{self.folder / MANIFEST}: its config is not one: {error}") from None

    def _tokens(self) -> list[int] | None:
        tokens = (self.manifest or {}).get("tokens")
        if tokens == []:
            raise UserError(f"{self.folder / MANIFEST}: its tokens are none")
        return tokens

    @property
    def stated_positions(self) -> tuple[int, ...] | None:
        """The positions that were written, where they were named one by one."""
        if self._positions is not None:
            return self._positions
        stated = (self.manifest or {}).get("positions")
        return tuple(stated) if isinstance(stated, list) and all(type(p) is int for p in stated) else None

    @property
    def unobservable(self) -> frozenset[str]:
        """Stages that the producer says it cannot show."""
        stated = (self.manifest or {}).get("missing", [])
        return (
            frozenset(stated) if isinstance(stated, list) and all(isinstance(s, str) for s in stated) else frozenset()
        )

    @property
    def stated_dtype(self) -> str | None:
        """The dtype in the manifest. Raises `UserError` for one that is not known."""
        dtype = (self.manifest or {}).get("dtype")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"{self.folder / MANIFEST}: dtype {brief(dtype)}; known are {', '.join(DTYPES)}")
        return dtype

    @property
    def stated_activations(self) -> str | None:
        """What the producer rounds activations to before a matmul, where it says so: one of `ACTIVATIONS`."""
        stated = (self.manifest or {}).get("activations")
        if stated is not None and stated not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{self.folder / MANIFEST}: activations {brief(stated)}; known are {known}")
        return stated

    def open(self, key: Key) -> TensorFile:
        """The file of a stage. Raises `UserError` where it is broken or changed, or its header names another layer."""
        layer, file = open_tensor(self.files[key], self._versions.get(key))
        # An engine may write layer 0 or "whole model" for the embedding; nothing else is ambiguous.
        if layer != key[0] and key[1] != "embedding":
            header, place = ("whole-model" if n is None else n for n in (layer, key[0]))
            raise UserError(f"{file.path}: its header says layer {header}, its place says {place}")
        return file

    def guess_dtype(self) -> str:
        """The narrowest dtype that most of the computed stages fit in, for an engine that does not say."""
        keys = [key for key in self.files if key[1] not in ("embedding", "moe_router_indices", "qkv_matmul")]
        votes = Counter(_fits(self.open(key).values[:_SAMPLE]) for key in keys[:64])
        return votes.most_common(1)[0][0] if votes else "float32"


def _listed(folder: Path) -> list[Path]:
    """What a folder holds: nothing where it is a file. One that cannot be read must not count as empty."""
    try:
        return sorted(folder.iterdir())
    except (NotADirectoryError, FileNotFoundError):  # the latter: a link to nothing
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _fits(values: np.ndarray) -> str:
    if values.dtype.name in ("float16", "bfloat16", "float64"):
        return values.dtype.name
    values = np.asarray(values)[np.isfinite(values)]
    for name, dtype in (("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)):
        with np.errstate(over="ignore"):
            if values.size and np.array_equal(values.astype(dtype).astype(values.dtype), values):
                return name
    return "float32"


def ordered(keys: set[Key]) -> list[Key]:
    """Keys in computation order: layer by layer in the order of the stage table, the whole model's stages last."""
    place = {name: index for index, name in enumerate(STAGES)}
    return sorted(keys, key=lambda key: (key[0] is None, key[0] or 0, place[key[1]]))


def _where(key: Key) -> str:
    return "the whole model" if key[0] is None else f"layer {key[0]}"


def path_of(key: Key) -> str:
    """How a stage is called in rules and reports: `layer-3/attn_norm`, `lm_head`."""
    return stage_path(*key).removesuffix(".bin")
