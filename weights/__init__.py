"""Checkpoints into typed parameters: configs, tensor names, safetensors. Imports nothing of the other packages."""

from weights.checkpoint import Checkpoint, open_checkpoint
from weights.config import Config, config_from_dict, read_config
from weights.errors import UserError
from weights.params import Layer, Params, random_params

__all__ = [
    "Checkpoint",
    "Config",
    "Layer",
    "Params",
    "UserError",
    "config_from_dict",
    "open_checkpoint",
    "random_params",
    "read_config",
]
