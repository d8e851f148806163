"""Random checkpoints of published shapes in seconds: all layers share the values of the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from weights import Config, config_from_dict
from weights.names import layer_shapes, model_shapes
from weights.opening import INDEX
from weights.tiny import tiny_config

ROWS = 4096  # of a matrix are drawn; the rest repeat them, since drawing a billion numbers takes longer than a run


def write_fast(folder: Path, like: str, **changes: int) -> Path:
    """A bfloat16 checkpoint of a dense shape, one file a layer; kept where it is already there."""
    if (folder / "config.json").exists():
        return folder
    raw = tiny_config("qwen2", like, **changes)
    config, places = config_from_dict(raw), {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(_shards(config)):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def _shards(config: Config) -> Iterator[dict[str, np.ndarray]]:
    yield {name: _values(name, shape) for name, shape in model_shapes(config).items()}
    first = {name: _values(name, shape) for name, shape in layer_shapes(config, 0).items()}
    for layer in range(config.num_hidden_layers):
        yield {name.replace("layers.0.", f"layers.{layer}.", 1): value for name, value in first.items()}


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norms around one, biases around zero, and matrices that keep the size of what they multiply."""
    rng = np.random.default_rng(list(name.encode()))
    drawn = rng.standard_normal((min(ROWS, shape[0]), *shape[1:]), dtype=np.float32)
    scaled = 1 + 0.1 * drawn if name.endswith("norm.weight") else drawn / np.float32(shape[-1] ** 0.5)
    return np.resize(scaled.astype(ml_dtypes.bfloat16), shape)
