"""THE table of peers: how each is run, in which environment, and what a reader should know about it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measure import dump_command, lean_command


@dataclass(frozen=True)
class Place:
    """What one run is given."""

    python: str  # of the peer's environment
    model: Path
    gguf: Path
    tokens: Path
    output: Path

    def module(self, name: str) -> list[str]:
        """A program of this folder."""
        return [
            self.python,
            "-m",
            f"tests.benchmarks.peers.{name}",
            str(self.model),
            str(self.tokens),
            str(self.output),
        ]

    def oracle(self, command: str, model: Path, *more: str) -> list[str]:
        """A command of `python -m oracle` that writes a tree."""
        words = [self.python, "-m", "oracle", command, str(model), "--tokens-file", str(self.tokens)]
        return [*words, "--output", str(self.output), *more]


@dataclass(frozen=True)
class Peer:
    """One row. `package`: what its own environment needs beside the project's; `versions`: what is printed of it."""

    name: str
    what: str
    command: Callable[[Place], list[str]]
    versions: tuple[str, ...]
    package: str | None = None
    gguf: bool = False


OURS = "jaxref"
PEERS: tuple[Peer, ...] = (
    Peer(
        OURS,
        "`python -m jaxref dump`: all stages, digests and figures in a manifest",
        lambda place: dump_command(place.model, place.tokens, place.output),
        ("jax", "jaxlib"),
    ),
    Peer(
        "hf",
        "`python -m oracle hf --dtype float32`: transformers eager with hooks, the same files and manifest",
        lambda place: place.oracle("hf", place.model, "--dtype", "float32"),
        ("transformers", "torch"),
    ),
    Peer(
        "hf-lean",
        "the same hooks, files alone: no manifest, no digests, logits of the last position only, no import of JAX",
        lambda place: lean_command(place.model, place.tokens, place.output),
        ("transformers", "torch"),
    ),
    Peer(
        "debugger",
        "transformers' `model_addition_debugger_context`, whole tensors of all layers: each module's inputs, and the"
        " outputs of those without parts, many of them the same tensor twice",
        lambda place: place.module("run_debugger"),
        ("transformers", "torch"),
    ),
    Peer(
        "transformer-lens",
        "TransformerLens, `run_with_cache` on its bridge; what is a stage of ours is asked for and written, once each",
        lambda place: place.module("run_transformer_lens"),
        ("transformer-lens", "transformers", "torch"),
        "transformer-lens==4.3.0",
    ),
    Peer(
        "nnsight",
        "nnsight, modules' values and operations by `.source`, written inside the trace",
        lambda place: place.module("run_nnsight"),
        ("nnsight", "transformers", "torch"),
        "nnsight==0.8.1",
    ),
    Peer(
        "llama.cpp",
        "`python -m oracle llama-cpp` on a GGUF file in F32 of the same weights, with our manifest",
        lambda place: place.oracle("llama-cpp", place.gguf),
        ("xllamacpp",),
        gguf=True,
    ),
)
NAMES = tuple(peer.name for peer in PEERS)


def python_of(peer: Peer, environments: Path) -> str:
    """The interpreter that runs a peer."""
    return sys.executable if peer.package is None else str(environments.absolute() / peer.name / "bin" / "python")
