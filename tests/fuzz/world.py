"""Small valid files and folders that the targets break, made once in a temporary folder."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.gguf_writer import write_gguf
from tests.trees import write_tree
from weights import Checkpoint, open_checkpoint
from weights.tiny import tiny_config, write_random

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 4, "mlp_only_layers": []}
INDEX = "model.safetensors.index.json"
STAGES = "embedding,attn_norm,q_post_rope,attn_scores,moe_router_indices,moe_router_logits,moe_expert_gate,lm_head"
TOKENS = [54, 71, 64]


class World:
    """A folder below which each target has a place of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def copy(self, source: Path, name: str) -> Path:
        """A folder's copy that a target may change, made at first use."""
        path = self.root / name
        if not path.exists():
            shutil.copytree(source, path)
        return path

    def file(self, name: str, data: bytes) -> Path:
        """A file with these bytes; others of its folder stay."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def _model(self, name: str, arch: str, **changes: Any) -> Path:
        path = self.root / "models" / name
        if not path.exists():
            write_random(path, tiny_config(arch, None, 1, **SMALL | changes), dtype="bfloat16")
        return path

    @cached_property
    def dense(self) -> Path:
        """A Qwen2 of one layer, with a tokenizer."""
        return self._model("dense", "qwen2")

    @cached_property
    def moe(self) -> Path:
        """A Qwen3-MoE of one layer."""
        return self._model("moe", "qwen3_moe", **EXPERTS)

    @cached_property
    def dense_checkpoint(self) -> Checkpoint:
        """The dense model, open."""
        return open_checkpoint(self.dense)

    @cached_property
    def moe_checkpoint(self) -> Checkpoint:
        """The model of the trees, open."""
        return open_checkpoint(self.moe)

    @cached_property
    def sharded(self) -> Path:
        """The dense model in two files with an index."""
        folder = self.copy(self.dense, "models/sharded")
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
        for file, names in parts.items():
            save_file({name: tensors[name] for name in names}, folder / file)
        places = {name: file for file, names in parts.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
        return folder

    @cached_property
    def ggufs(self) -> list[bytes]:
        """Plain, quantised, and with stacked experts."""
        blocks = self._model("blocks", "qwen3", hidden_size=32, head_dim=16, intermediate_size=32, vocab_size=260)
        files = [(self.dense, "F16"), (blocks, "Q8_0"), (self.moe, "F16")]
        changes = {"tokenizer.ggml.add_bos_token": False, "general.alignment": 32}
        written = [
            write_gguf(folder, self.root / "models" / f"{folder.name}.gguf", kind, changes) for folder, kind in files
        ]
        return [path.read_bytes() for path in written]

    @cached_property
    def trees(self) -> dict[str, Path]:
        """The same run in both formats."""
        for form in ("aprt", "safetensors"):
            write_tree(self.moe, self.root / "trees" / form, TOKENS, stages=STAGES, form=form)
        return {form: self.root / "trees" / form for form in ("aprt", "safetensors")}
