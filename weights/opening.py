"""Where a checkpoint is: a folder, a file, a GGUF, a sharded index or a cached Hugging Face id, opened as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weights.checkpoint import Checkpoint
from weights.config_json import read_config
from weights.errors import UserError, brief, listed, plain
from weights.files import read_json
from weights.safetensors_file import SafetensorsFile
from weights.tokenizer import open_tokenizer, tokenizer_from_metadata

if TYPE_CHECKING:
    from weights.checkpoint import TensorFile

# A tiny random Qwen2 that needs no download: `python -m weights tiny weights/embedded` made it. People call it `tiny`.
EMBEDDED = Path(__file__).parent / "embedded"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a folder, a `.safetensors` or `.gguf` file, an index file, a Hugging Face id in the local cache, or `tiny`.

    Raises `UserError` where there is none, where tensors are missing, unknown or mis-shaped (all of them listed), where
    a file is truncated, or where an index points outside its folder. Only safetensors are read, never pickles.
    """
    path = _locate(model)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / "config.json")
    places = _places(path)
    files = {name: SafetensorsFile(folder / name) for name in sorted(set(places.values()))}
    stored = _stored(folder, files)
    if path.name != SINGLE and (lost := sorted(t for t, f in places.items() if t and t not in files[f].entries)):
        raise UserError(f"{folder}: the index names tensors that their shard does not hold: {listed(lost)}")
    return Checkpoint(folder, config, files, stored, partial(open_tokenizer, folder))


def _open_gguf(path: Path) -> Checkpoint:
    from weights.gguf_config import read_gguf_config
    from weights.gguf_file import open_parts  # the `gguf` package takes 50 ms to import

    files = open_parts(path)
    places, metadata = _stored(path, files), files[path.name].metadata
    config = read_gguf_config(path, metadata, places)
    return Checkpoint(path, config, files, places, partial(tokenizer_from_metadata, path, metadata))


def _stored(where: Path, files: Mapping[str, TensorFile]) -> dict[str, str]:
    """Tensor name -> the one file that holds it."""
    places = {tensor: name for name, file in files.items() for tensor in file.entries}
    if len(places) < sum(len(file.entries) for file in files.values()):
        counts = Counter(tensor for file in files.values() for tensor in file.entries)
        twice = sorted(tensor for tensor, count in counts.items() if count > 1)
        raise UserError(f"{where}: tensors that more than one file holds: {listed(twice)}")
    return places


def _locate(model: str | Path) -> Path:
    if model == "":  # which `Path` takes for the folder that one is in
        raise UserError("MODEL is empty; a folder, a file or an id was expected")
    try:
        path = Path(model).expanduser()
        folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # no name of a file, or the home of a user who is not there
        raise UserError(f"{plain(model)}: no such model: {plain(error)}") from None
    if folder:
        return path
    if model == "tiny":
        return EMBEDDED
    if path.is_file():
        if path.suffix in (".safetensors", ".gguf") or path.name.endswith(".safetensors.index.json"):
            return path
        raise UserError(f"{path}: not a checkpoint; a folder, .safetensors, .gguf or {INDEX} was expected")
    if isinstance(model, str) and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _cached(model)
    raise UserError(
        f"{plain(model)}: no such model; give a folder, a .safetensors or .gguf file, or an id in Hugging Face's cache"
    )


def _cached(model_id: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_id, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UserError(f"{plain(model_id)}: neither a folder here nor an id in the local Hugging Face cache")
    return Path(found).parent


def _places(path: Path) -> dict[str, str]:
    """Tensor name -> file name; for a single file one entry with an empty tensor name."""
    if path.is_file() and path.suffix == ".safetensors":
        return {"": path.name}
    index = path if path.is_file() else path / INDEX
    if index.exists():
        return _read_index(index)
    if (path / SINGLE).exists():
        return {"": SINGLE}
    pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
    hint = f" ({', '.join(pickles)}: pickle files are never read)" if pickles else ""
    raise UserError(f"{path}: holds neither {SINGLE} nor {INDEX}{hint}")


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. A name is of the index's own folder, where a file may be a symbolic link elsewhere."""
    try:
        stated = read_json(index)
    except FileNotFoundError:
        raise UserError(f"{index}: no such file") from None
    places = stated.get("weight_map") if isinstance(stated, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()) or not places:
        raise UserError(f"{index}: not a safetensors index: weight_map must map tensor names to file names")
    for name in sorted(set(places.values())):
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"{index}: names {brief(name)}, which is not a file of its own folder")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {brief(name)}; only .safetensors files are read")
    return places
