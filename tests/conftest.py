"""Shared by all tests: shapes are checked while they run, and random checkpoints are made once a session."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook
from safetensors.numpy import load_file, save_file

JAXREF = Path(__file__).parents[1] / "jaxref"
# Before jaxref is imported, so that every annotated shape is checked in every test. Other modules have no shapes, and
# checking each of their calls would be a third of the time of a sweep.
SHAPED = [f"jaxref.{path.stem}" for path in JAXREF.glob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
install_import_hook(SHAPED, "beartype.beartype")

from weights.tiny import tiny_config, write_random  # noqa: E402

PROMPT = (54, 71, 64, 83, 220, 17, 10)  # 7 tokens


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-model", type=Path, help="a folder that ../shared/real-model filled: hf/ and a .gguf")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--real-model"):
        return
    for item in items:
        if "real_model" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --real-model DIR, which ../shared/real-model brings"))


@pytest.fixture
def real_model(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--real-model")


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 10000.0,
}
# name -> (arch, like, layers, changes of config.json)
ZOO: dict[str, tuple[str, str | None, int | None, dict]] = {
    "qwen2": ("qwen2", None, None, {}),
    "qwen2-tied": ("qwen2", None, None, {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", None, None, {}),
    "qwen2-yarn": ("qwen2", None, 2, {"rope_parameters": YARN}),
    "qwen3-linear": ("qwen3", None, 2, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2-window": ("qwen2", None, 3, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-0.5b": ("qwen2", "0.5b", 2, {"vocab_size": 4096}),
    "qwen2-0.5b-untied": ("qwen2", "0.5b", 2, {"vocab_size": 4096, "tie_word_embeddings": False}),
    "qwen3-0.6b": ("qwen3", "0.6b", 2, {"vocab_size": 4096}),
    "moe": ("qwen3_moe", None, None, {}),
    "moe-64": ("qwen3_moe", None, 3, {"num_experts": 64, "num_experts_per_tok": 8, "mlp_only_layers": []}),
    "moe-sparse": ("qwen3_moe", None, None, {"decoder_sparse_step": 2, "norm_topk_prob": False, "mlp_only_layers": []}),
}


def stack_experts(folder: Path) -> None:
    """Save the experts of a checkpoint as transformers 5 does: one tensor for all of a layer."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for layer in range(json.loads((folder / "config.json").read_text())["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        found = {key: tensors.pop(key) for key in sorted(tensors) if key.startswith(prefix)}
        count = len(found) // 3
        if count:
            parts = {
                part: np.stack([found[f"{prefix}{e}.{part}.weight"] for e in range(count)])
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            tensors[prefix + "gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
            tensors[prefix + "down_proj"] = parts["down_proj"]
    save_file(tensors, path)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """A function from a name of the zoo to the folder of its checkpoint, made at first use."""
    root = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            arch, like, layers, changes = ZOO[name]
            write_random(path, tiny_config(arch, like, layers, **changes), seed=len(name), dtype="float32")
            if name == "moe-64":
                stack_experts(path)
        return path

    return folder


def prompt(count: int, vocab_size: int) -> list[int]:
    """Token ids of a prompt of any length, all over the vocabulary, with repeats."""
    return [(i * i * 37 + 11 * i + 5) % vocab_size for i in range(count)]
