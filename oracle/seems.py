"""What a folder that is no tree seems to be, for the message that refuses it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from jaxref.loaded import FORMS, inside
from jaxref.one_file import ONE_FILE
from jaxref.stages import ALIASES, STAGES, Key, stage_named
from oracle.tensor_file import LAYER_FOLDER, READABLE
from weights import UserError
from weights.errors import plain

_FOREIGN = (".npz", ".pt", ".pth", ".txt", ".json", ".dat", ".raw", ".f32")


def _is_stage(name: str) -> bool:
    with suppress(UserError):
        return bool(stage_named(name))
    return False


def holds_stages(folder: Path) -> bool:
    """Whether a folder, however it is called, holds a file of a stage and is no tree of its own."""
    there = _quietly(folder)
    return any(path.suffix in FORMS and _is_stage(path.stem) for path in there) and not _is_tree(there)


def _is_tree(there: list[Path]) -> bool:
    return any(LAYER_FOLDER.fullmatch(path.name) for path in there)


def seems(folder: Path) -> str:
    """What a folder without a stage's file seems to be; nothing where that is not to be seen."""
    there = inside(folder)
    trees = [path for path in there if _is_tree(_quietly(path))]
    if trees:
        return f"; {plain(trees[0].name)} in it looks like a tree"
    if (folder / "config.json").exists():
        return "; it looks like a model, and `python -m jaxref dump` makes a tree of one"
    alone = [path.name for path in there if path.suffix in ONE_FILE and not _is_stage(path.stem)]
    if alone and not any(map(meant, alone)):
        return f"; if {plain(alone[0])} holds all tensors, give the file and not its folder"
    files = there + [below for path in there if LAYER_FOLDER.fullmatch(path.name) for below in _quietly(path)]
    if others := sorted({path.suffix for path in files} & set(_FOREIGN)):
        return f"; it holds {', '.join(others)}, and {READABLE}"
    names = [plain(path.name) for path in files if path.suffix in FORMS]
    flat = next((told for name in names if (told := _flat(name))), None)
    return flat or (f"; there is {names[0]}, and no stage is called so" if names else "")


def meant(name: str) -> Key | None:
    """The layer and stage that a name like `layer-3_attn_norm` or `blocks.3.attn_norm` says in another spelling."""
    held = [stage for stage in (*STAGES, *ALIASES) if stage in name.lower()]
    if not held:
        return None
    found = stage_named(said := max(held, key=len))
    if found.scope == "model":
        return None, said
    number = re.search(r"[0-9]{1,9}", name.lower().replace(said, " "))
    return number and (int(number[0]), said)


def _flat(name: str) -> str | None:
    """Where a file that is named in another spelling would be read."""
    stem, suffix = name.rsplit(".", 1)
    if (key := meant(stem)) is None:
        return None
    layer, stage = key
    whose, place = ("", "") if layer is None else (f" of layer {layer}", f"layer-{layer}/")
    return f"; {name} seems to be {stage}{whose}, which is read at {place}{stage}.{suffix}"


def _quietly(folder: Path) -> list[Path]:
    with suppress(UserError):
        return inside(folder)
    return []
