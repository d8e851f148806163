"""Checkpoints into typed parameters: configs, tensor names, safetensors. Imports nothing of the other packages."""

from weights.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from weights.config import Config
from weights.config_json import config_from_dict, read_config
from weights.errors import UserError
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
