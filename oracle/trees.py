"""A tree of tensor files, opened lazily: which stages it has, whose they are, and each as a flat array in its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxref.loaded import inside, stated_by
from jaxref.stages import STAGES, Key, stage_named
from jaxref.tree import MANIFEST, SUFFIXES, UNFINISHED, stage_path
from oracle.seems import FORMS, holds_stages, seems
from oracle.tensor_file import LAYER_FOLDER, TensorFile, open_tensor
from weights import Config, UserError
from weights.errors import brief, listed, plain
from weights.watched import Version

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (*DTYPES, "q8")
_PACKED = (".zip", ".gz", ".tgz", ".tar", ".zst", ".xz", ".bz2", ".7z")
_SAMPLE = 1 << 16  # values of a file that are looked at to guess the dtype


class Tree:
    """The folder of one run. `role` ("reference", "test", "yardstick") is how messages call it.

    `positions` are those of the rows, for a producer that writes no manifest. Each file is read as it lies there now:
    once it is changed, reading it raises `UserError`, so that no figure is of two runs. Raises `UserError` for a folder
    that holds no stage, one that cannot be read, or a broken manifest.
    """

    def __init__(self, folder: str | Path, role: str, positions: tuple[int, ...] | None = None) -> None:
        self.folder, self.role, self.asked_positions = Path(folder), role, positions
        if not self.folder.exists():
            raise UserError(f"{self.folder}: no such folder (the {role} tree)")
        if not self.folder.is_dir():
            packed = self.folder.suffix in _PACKED
            advice = "unpack it and give the folder" if packed else "`oracle diff` compares files"
            raise UserError(f"{self.folder}: is a file, and the {role} tree is a folder; {advice}")
        if (self.folder / UNFINISHED).exists() and not (self.folder / MANIFEST).exists():
            raise UserError(f"{self.folder}: its dump was not finished; run the same dump again")
        self.manifest = stated_by(self.folder)
        self._check_positions()
        self.unknown: list[str] = []
        self._versions: dict[Key, Version] = {}
        self.files = self._find()
        self._check_layers()
        if not self.files:
            known = ", ".join(f"layer-0/attn_norm.{suffix}" for suffix in SUFFIXES.values())
            words = f"holds no stage's file (like {known}), so there is nothing to compare"
            raise UserError(f"{self.folder}: {words}{seems(self.folder)}")
        self.config = self._config()
        self.tokens = self._tokens()

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

    def _check_positions(self) -> None:
        """Refuse positions that are not those of the manifest."""
        stated, tokens = ((self.manifest or {}).get(key) for key in ("positions", "tokens"))
        if stated == "all" and tokens:
            stated = list(range(len(tokens)))
        asked = self.asked_positions
        if asked is not None and isinstance(stated, list) and list(asked) != stated:
            words = f"its manifest says positions {listed(stated, ',')}, {listed(asked, ',')} were given"
            raise UserError(f"{self.folder}: {words}; leave --positions away")

    def _check_layers(self) -> None:
        """Refuse layers in folders of another spelling; where some are spelled right, the others are `unknown`."""
        others = [path for path in inside(self.folder) if not LAYER_FOLDER.fullmatch(path.name) and holds_stages(path)]
        if others and all(layer is None for layer, _ in self.files):
            words = f"the stages of {listed(path.name for path in others[:3])} are not read"
            raise UserError(f"{self.folder}: {words}: layers are the folders layer-0, layer-1, … in it; rename them")
        self.unknown += [plain(path.name) for path in others]

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
        if self.asked_positions is not None:
            return self.asked_positions
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
