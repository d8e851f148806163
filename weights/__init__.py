"""Checkpoints into typed parameters: configs, tensor names, safetensors. Imports nothing of the other packages."""

from typing import TYPE_CHECKING

from weights.lazily import lazily

if TYPE_CHECKING:
    from weights.checkpoint import Checkpoint
    from weights.config import Config
    from weights.config_json import config_from_dict, read_config
    from weights.errors import UserError
    from weights.opening import EMBEDDED, open_checkpoint
    from weights.params import Expert, Layer, Params, random_params
    from weights.tokenizer import Tokenizer, open_tokenizer

__all__ = [
    "EMBEDDED",
    "Checkpoint",
    "Config",
    "Expert",
    "Layer",
    "Params",
    "Tokenizer",
    "UserError",
    "config_from_dict",
    "open_checkpoint",
    "open_tokenizer",
    "random_params",
    "read_config",
]

_HOME = {
    "weights.checkpoint": ("Checkpoint",),
    "weights.config": ("Config",),
    "weights.config_json": ("config_from_dict", "read_config"),
    "weights.errors": ("UserError",),
    "weights.opening": ("EMBEDDED", "open_checkpoint"),
    "weights.params": ("Expert", "Layer", "Params", "random_params"),
    "weights.tokenizer": ("Tokenizer", "open_tokenizer"),
}

__getattr__ = lazily(__name__, _HOME)
