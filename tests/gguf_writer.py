"""GGUF files out of Hugging Face checkpoints, by the `gguf` package's own writer and its own table of names."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from weights import Checkpoint, Config, open_checkpoint

ARCHITECTURES = {"qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "qwen3_moe": MODEL_ARCH.QWEN3MOE}
GGUF_NAMES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
# Types that the package can read and not make: where the float16 scales of a block lie.
SCALES = {"Q2_K": slice(80, 84), "Q3_K": slice(108, 110), "Q4_K": slice(0, 4), "Q5_K": slice(0, 4)}
SCALES |= dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), slice(0, 2))
SCALES["Q6_K"] = slice(208, 210)


Encode = Callable[[np.ndarray, GGMLQuantizationType], np.ndarray]


def write_gguf(
    folder: Path,
    path: Path,
    kind: str | Callable[[str], str] = "F32",
    changes: dict[str, Any] | None = None,
    *,
    per_part: int = 0,
    encode: Encode | None = None,
) -> Path:
    """The checkpoint of a folder as a GGUF file with its matrices stored as `kind`; vectors and routers stay F32.

    `kind` may be one for each name in GGUF. `changes` are metadata by their full keys, None for a key to leave out.
    With `per_part`, a split model of so many tensors a file; returned is the first. K-quants get random values, as the
    package cannot make them, unless `encode` can.
    """
    checkpoint = open_checkpoint(folder)
    known = metadata(checkpoint.config) | tokens(folder) | (changes or {})
    writer = GGUFWriter(path, known.pop("general.architecture"), split_max_tensors=per_part)
    for key, value in known.items():
        add(writer, key, value)
    for name, values in tensors(checkpoint):
        plain = values.ndim == 1 or "ffn_gate_inp" in name
        stored = GGMLQuantizationType["F32" if plain else kind if isinstance(kind, str) else kind(name)]
        writer.add_tensor(name, (encode or encoded)(values.astype(np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value, of the type that llama.cpp's converter takes for it; None is none."""
    for kind, method in ((bool, "bool"), (str, "string"), (int, "uint32"), (float, "float32"), (list, "array")):
        if isinstance(value, kind):
            getattr(writer, f"add_{method}")(key, value)
            return


def metadata(config: Config) -> dict[str, Any]:
    """What llama.cpp's converter writes about a model."""
    arch = GGUF_NAMES[config.model_type]
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": 4096,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.num_experts:
        found |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if scaling := config.rope_scaling:
        found |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": scaling.factor}
        found["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in found.items()}


def tokens(folder: Path) -> dict[str, Any]:
    """The tokenizer of a folder as metadata; ids that no token has are filled up as unused."""
    stated = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    names, kinds = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, i in stated["model"]["vocab"].items():
        names[i], kinds[i] = token, 1
    for token in stated["added_tokens"]:
        names[token["id"]], kinds[token["id"]] = token["content"], 3 if token["special"] else 4
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stated["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges or None,  # the writer takes no empty array
        "tokenizer.ggml.eos_token_id": names.index(settings["eos_token"]),
        "tokenizer.chat_template": settings["chat_template"],
    }


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by GGUF's names, the experts of a layer as one."""
    config = checkpoint.config
    # The package's table of Qwen3-MoE has no dense layers, as llama.cpp has none there; Qwen3's names are the same.
    maps = [get_tensor_name_map(ARCHITECTURES[a], config.num_hidden_layers) for a in (config.model_type, "qwen3")]

    def named(name: str) -> str:
        found = next(filter(None, (m.get_name(name, try_suffixes=(".weight", ".bias")) for m in maps)), None)
        assert found is not None, name
        return found

    for name in checkpoint.tensor_names:
        if ".experts." not in name:
            yield named(name), checkpoint.tensor(name)
    for layer in filter(config.is_moe, range(config.num_hidden_layers)):
        experts = [checkpoint.expert(layer, e) for e in range(config.num_experts)]
        for part in ("gate_proj", "up_proj", "down_proj"):
            stacked = np.stack([getattr(expert, part) for expert in experts])
            yield named(f"model.layers.{layer}.mlp.experts.{part}.weight"), stacked


def encoded(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values as a file holds them: bytes [.., row bytes]; for K-quants and I-quants random ones, finite."""
    if kind.name not in (*SCALES, "IQ1_M"):
        return quants.quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    if kind.name == "IQ1_M":  # a fourth of the scale, 0x0a55, in the highest bits of each of four numbers
        blocks[:, 49:56:2] = blocks[:, 49:56:2] & 15 | np.array([0x50, 0x50, 0xA0, 0x00], np.uint8)
        return blocks.reshape(*values.shape[:-1], values.shape[-1] // block * size)
    at = SCALES[kind.name]
    scales = rng.uniform(1e-5, 1e-4, (len(blocks), (at.stop - at.start) // 2)).astype(np.float16)
    blocks[:, at] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], values.shape[-1] // block * size)


def encoded_by_ggml(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values as llama.cpp's own library quantises them."""
    from oracle.engines.llama_api import load

    if kind.name in ("F32", "F16", "BF16"):
        return quants.quantize(values, kind)
    library = load()
    quantize, demands = library.ggml_quantize_chunk, library.ggml_quantize_requires_imatrix
    demands.restype, demands.argtypes = ctypes.c_bool, [ctypes.c_int]
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    block, size = GGML_QUANT_SIZES[kind]
    rows, columns = values.size // values.shape[-1], values.shape[-1]
    values, importance = np.ascontiguousarray(values), np.ones(columns, np.float32)
    wanted = importance.ctypes.data if demands(int(kind)) else None  # with it other types have other numbers
    found = np.empty((*values.shape[:-1], columns // block * size), np.uint8)
    where = (values.ctypes.data, found.ctypes.data, 0, rows, columns, wanted)
    assert quantize(int(kind), *where) == found.size
    return found
