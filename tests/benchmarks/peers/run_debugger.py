"""transformers' own `model_addition_debugger_context`: what every module takes, and what those without parts return."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.model_debugging_utils import model_addition_debugger_context

from tests.benchmarks.peers.emit import read_tokens


def main(model: str, tokens: str, output: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    # Whole tensors of all layers; the defaults write a text of some values of the first and the last layer.
    with model_addition_debugger_context(loaded, debug_path=output, do_prune_layers=False, use_repr=False):
        loaded(input_ids=read_tokens(tokens), use_cache=False, logits_to_keep=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
