"""A tree of tensor files with its manifest, written so that what is there is whole and what is whole is known.

Every file goes to a temporary name and is renamed; `manifest.json` comes last. While a dump runs, `.unfinished.json`
says whose it is, so that the same command can finish it and another one cannot mix its files in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jaxref.writing import locked, temporary_of, write_json
from weights import UserError
from weights.files import read_json
from weights.identity import same_weights

SCHEMA = "jaxref-tree-v1"
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished.json"
# A file of a tree: what another spelling names may lie outside the folder.
_PATH = re.compile(r"(layer-[0-9]{1,9}/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
SUFFIXES = {"aprt": "bin", "safetensors": "safetensors"}
# What may differ between two dumps into one folder: words for people, not what the bytes depend on.
_WORDS = ("prompt", "model")


def stage_path(layer: int | None, stage: str, form: str = "aprt") -> str:
    """Where a stage lies below the folder, as the contract says."""
    file = f"{stage}.{SUFFIXES[form]}"
    return file if layer is None else f"layer-{layer}/{file}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a tree; None where there is none. Raises `UserError` for a broken or newer one.

    What it says of files is about paths below the folder; nobody opens a file because a manifest names it.
    """
    return _read_json(folder / MANIFEST)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or found.get("files", []) is None:
        raise UserError(f"{path}: not a manifest of this version ({SCHEMA})")
    for key, (known, what) in _LISTS.items():
        stated = found.get(key)
        if stated is not None and not (isinstance(stated, list) and all(map(known, stated))):
            raise UserError(f"{path}: its {key} are no list of {what}")
    return found


def _is_entry(entry: Any) -> bool:
    path = entry.get("path") if isinstance(entry, dict) else None
    return isinstance(path, str) and _PATH.fullmatch(path) is not None


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 1 << 32


# What a manifest lists, where it does.
_LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "files": (_is_entry, "entries with a path below the folder"),
    "weights": (lambda file: isinstance(file, dict), "objects"),
    "tokens": (_is_id, "ids"),
}


class Tree:
    """The folder of one dump while it is written; nobody else writes there between `with` and its end.

    `run` says what its bytes depend on, as JSON values; `paths` are the files to be written, `size` their bytes.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], paths: Iterable[str], size: int) -> None:
        self.folder, self.paths, self._size = folder, list(paths), size
        self.run = {"schema": SCHEMA, **run}
        self._stated: dict[str, dict[str, Any]] = {}  # the manifest's lines before this dump
        self._entries: dict[str, dict[str, Any]] = {}
        self._begun: list[str] = []  # files of dumps that did not end

    def __enter__(self) -> Tree:
        """Make the folder, lock it and say whose it is.

        Raises `UserError` where this dump must not be written here; then nothing is touched.
        """
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as until:
            until.enter_context(locked(self.folder, self._other))
            self._check()  # again: another dump may have begun or ended before the lock was ours
            self._begin()
            self._until = until.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._until.close()

    def _other(self) -> str:
        begun = _read_json(self.folder / UNFINISHED) or {}
        return f"another dump (pid {begun['pid']})" if isinstance(begun.get("pid"), int) else "another dump"

    def _check(self) -> None:
        for parent in (self.folder, *self.folder.parents):
            if parent.is_symlink() and not parent.exists():
                raise UserError(f"{parent}: is a symbolic link to nothing; choose another --output")
            if parent.exists() and not parent.is_dir():
                raise UserError(f"{parent}: is a file, not a folder; choose another --output")
        manifest, begun = read_manifest(self.folder), _read_json(self.folder / UNFINISHED)
        for before in (manifest, begun):
            if before is not None:
                self._same_run(before)
        self._stated, self._begun = _files(manifest), list(_files(begun))
        self._entries = {path: entry for path, entry in self._stated.items() if (self.folder / path).is_file()}
        there = [path for path in self.paths if os.path.lexists(self.folder / path)]
        ours = {*self._stated, *self._begun}
        if foreign := [path for path in there if path not in ours]:
            why = " and no manifest" if manifest is None else f", which {MANIFEST} does not list"
            raise UserError(
                f"{self.folder}: holds {foreign[0]}{why}, so it is another program's tree; choose another --output"
            )
        replaced = sum((self.folder / path).lstat().st_size for path in there)
        parent = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if self._size - replaced > free:
            raise UserError(f"{self.folder}: {self._size:,} bytes are to be written, the disk has {free:,} left")

    def _same_run(self, before: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(self.run))
        differing = [key for key in ours if key not in _WORDS and not _agree(key, ours, before)]
        if "dtype" in differing:  # which the activations follow
            differing = [key for key in differing if key != "activations"]
        if differing:
            raise UserError(
                f"{self.folder}: holds another dump ({', '.join(differing)} differ);"
                " choose another --output or remove that folder"
            )

    def _begin(self) -> None:
        for path in self._begun:
            temporary_of(self.folder / path).unlink(missing_ok=True)
        self._begun = list(dict.fromkeys([*self._begun, *self.paths]))
        files = [{"path": path} for path in self._begun]
        write_json(self.folder / UNFINISHED, {**self.run, "pid": os.getpid(), "files": files})

    def stated(self, path: str) -> str | None:
        """The SHA-256 that a file must have, since the manifest says so already."""
        return self._stated.get(path, {}).get("sha256")

    def add(self, entry: dict[str, Any]) -> None:
        """Note a file that is written and renamed."""
        self._entries[entry["path"]] = entry

    def finish(self, order: Sequence[str]) -> Path:
        """Write the manifest, its files in the `order` of their paths, and return its path."""
        entries = [self._entries[path] for path in order if path in self._entries]
        write_json(self.folder / MANIFEST, {**self.run, "files": entries})
        # A larger dump that was cut off before may have left files, and they stay known as ours.
        if not any((self.folder / path).exists() for path in self._begun if path not in self._entries):
            (self.folder / UNFINISHED).unlink(missing_ok=True)
        return self.folder / MANIFEST


def _files(known: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {entry["path"]: entry for entry in (known or {}).get("files", [])}


def _agree(key: str, ours: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a line of two manifests says the same: of the weights, as far as both say something of their bytes."""
    one, other = _stated(key, ours), _stated(key, before)
    if key == "weights" and isinstance(one, list) and isinstance(other, list):
        return same_weights(one, other)
    return one == other


def _stated(key: str, run: Mapping[str, Any]) -> Any:
    value = run.get(key)
    # A tree of an older version does not say what activations were rounded to.
    return run.get("dtype") if key == "activations" and value is None else value
