"""A tree of tensor files with its manifest, written so that what is there is whole and what is whole is known.

Every file goes to a temporary name and is renamed; `manifest.json` comes last. While a dump runs, `.unfinished.json`
says whose it is, so that the same command can finish it and another one cannot mix its files in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weights import UserError

SCHEMA = "jaxref-tree-v1"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished.json"
SUFFIXES = {"aprt": "bin", "safetensors": "safetensors"}
# What may differ between two dumps into one folder: words for people, not what the bytes depend on.
_WORDS = ("prompt", "model")


def stage_path(layer: int | None, stage: str, form: str = "aprt") -> str:
    """Where a stage lies below the folder, as the contract says."""
    file = f"{stage}.{SUFFIXES[form]}"
    return file if layer is None else f"layer-{layer}/{file}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a tree; None where there is none. Raises `UserError` for a broken or newer one."""
    return _read_json(folder / MANIFEST)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("files", []), list):
        raise UserError(f"{path}: not a manifest of this version ({SCHEMA})")
    return found


class Tree:
    """The folder of one dump while it is written. `run` says what its bytes depend on, as JSON values."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.run = {"schema": SCHEMA, **run}
        self._entries: dict[str, dict[str, Any]] = {}

    def check(self, paths: Iterable[str], size: int) -> None:
        """Raise `UserError` where this dump must not be written here; nothing is touched.

        `paths` are the files to be written, `size` their bytes.
        """
        for parent in (self.folder, *self.folder.parents):
            if parent.exists() and not parent.is_dir():
                raise UserError(f"{parent}: is a file, not a folder; choose another --output")
        paths = list(paths)
        before = read_manifest(self.folder) or _read_json(self.folder / UNFINISHED)
        there = [path for path in paths if (self.folder / path).exists()]
        if before is not None:
            self._same_run(before)
            self._entries = {entry["path"]: entry for entry in before.get("files", [])}
        elif there:
            raise UserError(
                f"{self.folder}: holds {there[0]} and no manifest, so it is another program's tree;"
                " choose another --output"
            )
        replaced = sum((self.folder / path).stat().st_size for path in there)
        parent = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if size - replaced > free:
            raise UserError(f"{self.folder}: {size:,} bytes are to be written, the disk has {free:,} left")

    def _same_run(self, before: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(self.run))
        differing = [key for key in ours if key not in _WORDS and _essence(key, ours) != _essence(key, before)]
        if "dtype" in differing:  # which the activations follow
            differing = [key for key in differing if key != "activations"]
        if differing:
            raise UserError(
                f"{self.folder}: holds another dump ({', '.join(differing)} differ);"
                " choose another --output or remove that folder"
            )

    def begin(self) -> None:
        """Make the folder and say whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).exists():
            _write_json(self.folder / UNFINISHED, self.run)

    def add(self, entry: dict[str, Any]) -> None:
        """Note a file that is written and renamed."""
        self._entries[entry["path"]] = entry

    def finish(self, order: Sequence[str]) -> Path:
        """Write the manifest, its files in the `order` of their paths, and return its path."""
        entries = [self._entries[path] for path in order if path in self._entries]
        _write_json(self.folder / MANIFEST, {**self.run, "files": entries})
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return self.folder / MANIFEST


def _essence(key: str, run: Mapping[str, Any]) -> Any:
    """What must agree: of the weights the headers, since whole files are hashed only on demand."""
    value = run.get(key)
    if key == "activations" and value is None:  # a tree of an older version
        return run.get("dtype")
    if key == "weights" and isinstance(value, list):
        return [{k: v for k, v in file.items() if k != "sha256"} for file in value]
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
