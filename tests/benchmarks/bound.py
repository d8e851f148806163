"""The least time that a dump of all stages can take on this machine, from what it must move and compute.

    python -m tests.benchmarks.bound MODEL TOKENS_FILE [--folder DIR]

Prints one JSON object. Four things are counted, each timed here by itself with both cores and all threads on it:
- read: every stored weight that a dump needs once, out of the page cache, and its float32 written to memory;
- multiply: the matrix products of all layers and of the last position's head, with no saving for the causal mask, as
  `attn_scores` holds every key; float32, highest precision, the dump's shapes and layout, by JAX;
- write: the very files of the tree, with other bytes, by two threads through the page cache;
- digest: SHA-256 of those bytes, which the manifest states.
Not counted: Python's start and imports, norms, RoPE, softmax and what else is no product, the figures of the manifest.
`max` is the bound if everything ran beside everything else for nothing, `sum` if one came after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxref.stages import STAGES, keys_of
from weights import Checkpoint, Config, open_checkpoint
from weights.names import layer_rows, model_shapes

THREADS = os.cpu_count() or 1
PIECE = 1 << 23  # values of a block that is converted; its float32 do not fit into the processor's caches
OPERANDS = 128 << 20  # bytes of right-hand sides that are taken in turn, so that they come out of memory
WRITERS = 2


@dataclass(frozen=True)
class Product:
    """`times` products [b, m, k] · [b, n, k]ᵀ of a dump."""

    b: int
    m: int
    k: int
    n: int
    times: int

    @property
    def flops(self) -> int:
        """Of all of them."""
        return 2 * self.b * self.m * self.k * self.n * self.times


def products(config: Config, count: int) -> list[Product]:
    """Every matrix product of a dump of `count` tokens. Dense models only."""
    d = config.dims()
    layers, group = d["L"], d["H"] // d["K"] * count
    qkv = (d["H"] + 2 * d["K"]) * d["h"]
    return [
        Product(1, count, d["D"], qkv, layers),
        Product(d["K"], group, d["h"], count, layers),
        Product(d["K"], group, count, d["h"], layers),
        Product(1, count, d["H"] * d["h"], d["D"], layers),
        Product(1, count, d["D"], d["F"], 2 * layers),
        Product(1, count, d["F"], d["D"], layers),
        Product(1, 1, d["D"], d["V"], 1),
    ]


def weight_count(config: Config, tokens: list[int]) -> int:
    """Weights that a dump reads: all layers, the head, the last norm, and of the embedding the tokens' rows."""
    layers = sum(
        math.prod(row.shape(config)) for layer in range(config.num_hidden_layers) for row in layer_rows(config, layer)
    )
    head = model_shapes(config).get("lm_head.weight", (config.vocab_size, config.hidden_size))
    return layers + math.prod(head) + config.hidden_size * (1 + len(set(tokens)))


def file_sizes(config: Config, count: int) -> list[int]:
    """Bytes of each file of the tree, of `lm_head` the last position alone."""
    stages = [STAGES[stage] for _, stage in keys_of(config)]
    return [12 + 4 * math.prod(stage.shape(config, count, 1 if stage.last else None)) for stage in stages]


def best(work: Callable[[], float], seconds: float = 3.0, least: int = 3) -> float:
    """The shortest of several goes: at least `least`, unless they take longer than `seconds` in all."""
    begun, times = time.perf_counter(), [work()]
    while len(times) < least and time.perf_counter() - begun < seconds:
        times.append(work())
    return min(times)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def at_once(work: Callable[[int], Any], threads: int) -> None:
    """Call work(0) … work(threads - 1) at the same time."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def read_rate(checkpoint: Checkpoint) -> float:
    """Weights a second, from page cache to float32 in memory, over the whole checkpoint."""
    views = [checkpoint.tensor(name).reshape(-1) for name in checkpoint.tensor_names]
    pieces = [view[i : i + PIECE] for view in views for i in range(0, view.size, PIECE)]
    buffers = [np.empty(PIECE, np.float32) for _ in range(THREADS)]

    def convert(thread: int) -> None:
        for piece in pieces[thread::THREADS]:
            np.copyto(buffers[thread][: piece.size], piece, casting="unsafe")

    def once() -> float:
        checkpoint.release()  # every process has to map the pages of the files anew
        return timed(lambda: at_once(convert, THREADS))

    return sum(view.size for view in views) / best(once)


def digest_rate() -> float:
    """Bytes a second of SHA-256."""
    data = np.zeros(1 << 25, np.uint8)
    return WRITERS * data.size / best(lambda: timed(lambda: at_once(lambda _: hashlib.sha256(data).digest(), WRITERS)))


def write_seconds(sizes: list[int], parent: Path | None) -> float:
    """Seconds to write files of these sizes."""
    data = memoryview(np.random.default_rng(0).bytes(min(max(sizes), 1 << 26)))

    def once() -> float:
        folder = Path(tempfile.mkdtemp(dir=parent))

        def write(thread: int) -> None:
            for index in range(thread, len(sizes), WRITERS):
                with (folder / str(index)).open("wb", buffering=0) as file:
                    for size in _pieces(sizes[index], len(data)):
                        file.write(data[:size])

        os.sync()
        try:
            return timed(lambda: at_once(write, WRITERS))
        finally:
            shutil.rmtree(folder)

    return best(once, seconds=20.0)


def _pieces(size: int, most: int) -> Iterator[int]:
    for start in range(0, size, most):
        yield min(most, size - start)


@jax.jit
def _multiply(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((2,), (2,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST)


def product_seconds(product: Product) -> float:
    """Seconds for all its times: as many of them as fill `OPERANDS` in turn, over and over."""
    p = product
    copies = max(1, min(p.times, OPERANDS // (4 * p.b * p.n * p.k)))
    x, *operands = (jnp.ones((p.b, p.n if i else p.m, p.k), jnp.float32) for i in range(1 + copies))
    _multiply(x, operands[0]).block_until_ready()

    def once() -> float:
        def work() -> None:
            for w in operands:
                _multiply(x, w).block_until_ready()

        return timed(work) / len(operands)

    return p.times * best(once, seconds=1.0, least=5)


def bound(checkpoint: Checkpoint, tokens: list[int], folder: Path | None) -> dict[str, Any]:
    """What is counted, the rates, the seconds of each part, their greatest and their sum."""
    config, count = checkpoint.config, len(tokens)
    weights, sizes = weight_count(config, tokens), file_sizes(config, count)
    work = products(config, count)
    itemsize = checkpoint.dtype(checkpoint.tensor_names[0]).itemsize
    rate, digest = read_rate(checkpoint), digest_rate()
    parts = {
        "read": weights / rate,
        "multiply": sum(map(product_seconds, work)),
        "write": write_seconds(sizes, folder),
        "digest": sum(sizes) / digest,
    }
    flops = sum(product.flops for product in work)
    return {
        "tokens": count,
        "bytes_read": weights * itemsize,
        "bytes_upcast": weights * 4,
        "bytes_written": sum(sizes),
        "flops": flops,
        "read_bytes_per_second": rate * itemsize,
        "digest_bytes_per_second": digest,
        "write_bytes_per_second": sum(sizes) / parts["write"],
        "flops_per_second": flops / parts["multiply"],
        "seconds": parts,
        "max": max(parts.values()),
        "sum": sum(parts.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path, help="a file of ids, by commas")
    parser.add_argument("--folder", type=Path, help="where files are written")
    options = parser.parse_args()
    tokens = [int(word) for word in options.tokens.read_text(encoding="utf-8").split(",")]
    print(json.dumps(bound(open_checkpoint(options.model), tokens, options.folder)))


if __name__ == "__main__":
    main()
