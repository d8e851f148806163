"""Checkpoints with seeded random weights in Hugging Face's format: tiny ones, or with the layer shapes of real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from weights import names
from weights.config import Config
from weights.config_json import config_from_dict
from weights.errors import UserError
from weights.opening import INDEX, SINGLE
from weights.params import random_tensor

DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

# One dense layer, and one that has only the experts left.
_TINY_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}

_TINY: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 72,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def _like(arch: str, V: int, D: int, F: int, L: int, H: int, K: int, h: int, tied: bool) -> dict[str, Any]:
    """A published model's numbers, in the letters of the dimension key."""
    return {
        "model_type": arch,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "head_dim": h,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


# From the config.json of Qwen2.5-Coder-{0.5B,1.5B,7B}-Instruct, Qwen3-{0.6B,4B,8B} and Qwen3-Coder-30B-A3B-Instruct.
LIKE: dict[str, dict[str, Any]] = {
    "0.5b": _like("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "1.5b": _like("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "7b": _like("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "0.6b": _like("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "4b": _like("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "8b": _like("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "30b-a3b": _like("qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128, False)
    | {
        "rope_theta": 1e7,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def tiny_config(arch: str, like: str | None = None, layers: int | None = None, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a random checkpoint. Raises `UserError` for an unknown `like` or one of another arch."""
    if like is not None and like not in LIKE:
        raise UserError(f"--like {like}: no such shape; known are {', '.join(LIKE)}")
    raw: dict[str, Any] = (
        dict(LIKE[like]) if like else _TINY | {"model_type": arch} | (_TINY_MOE if arch == "qwen3_moe" else {})
    )
    if raw["model_type"] != arch:
        raise UserError(f"--like {like} is a {raw['model_type']}, not a {arch}")
    if layers is not None:
        raw |= {"num_hidden_layers": layers}
        if "mlp_only_layers" in raw:
            raw["mlp_only_layers"] = [i for i in raw["mlp_only_layers"] if i < layers]
    raw |= {"architectures": [_CLASSES[arch]], "dtype": "bfloat16", "hidden_act": "silu"}
    return raw | changes


def write_random(folder: Path, raw: dict[str, Any], *, seed: int = 0, dtype: str = "bfloat16") -> None:
    """Write a checkpoint of this config: one file where it is small, one a layer where it is not.

    Raises `UserError` where the folder already holds a checkpoint.
    """
    config = config_from_dict(raw)
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: already holds a checkpoint; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if config.hidden_size < 512:
        everything = dict(names.expected(config))
        save_file(_make(everything, seed, dtype), folder / SINGLE, metadata={"format": "pt"})
        _write_tokenizer(folder, config.vocab_size)
    else:
        _write_shards(folder, config, seed, dtype)
    # Last, so that a half-written folder is never taken for a checkpoint.
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": dtype}, indent=1) + "\n", encoding="utf-8")


def _make(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> dict[str, np.ndarray]:
    return {name: random_tensor(name, shape, seed).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def _write_shards(folder: Path, config: Config, seed: int, dtype: str) -> None:
    places: dict[str, str] = {}
    total = config.num_hidden_layers + 1
    for number, shapes in enumerate(_shards(config), start=1):
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        save_file(_make(shapes, seed, dtype), folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    size = sum(np.prod(shape, dtype=int) for _, shape in names.expected(config)) * np.dtype(DTYPES[dtype]).itemsize
    index = {"metadata": {"total_size": int(size)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(config: Config) -> Iterator[dict[str, tuple[int, ...]]]:
    yield names.model_shapes(config)
    for layer in range(config.num_hidden_layers):
        yield names.layer_shapes(config, layer)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """One token a byte, with ChatML's special tokens after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(special):
        return
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(special)
    backend.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[2], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
