"""A checkpoint as a GGUF file in F32: `python -m tests.benchmarks.peers.make_gguf MODEL FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.gguf_writer import tokens, write_gguf


def main(model: Path, path: Path) -> None:
    known = tokens(model)
    changes = {}
    if known["tokenizer.ggml.merges"] is None:
        # llama.cpp loads no vocabulary without merges; the last id of a random model is none of its tokenizer's.
        changes = {
            "tokenizer.ggml.tokens": [*known["tokenizer.ggml.tokens"][:-1], "ab"],
            "tokenizer.ggml.merges": ["a b"],
        }
    write_gguf(model, path, "F32", changes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
