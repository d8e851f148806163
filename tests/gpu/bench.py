"""One side of the GPU benchmark, in a process of its own so that its memory is given back: prints one JSON object.

    python -m tests.gpu.bench SIDE [MODEL] [--device cuda] [--tokens 7] [--repeat 10]

SIDE is session (`jaxref.Session.forward`), jit (`jax.jit(jaxref.forward)`) or hf (Hugging Face eager with hooks), all
in float32 and with every stage; "resident": the values stay on the device, "home": they come to the host as well. Or it
is bandwidth, products (of few rows, beside XLA's) or tiles (the kernel for them in other tiles than its own).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

WARM = 3  # runs before the first that counts
COPIES = 8  # that a measurement of the bandwidth makes, and of a product's weights
SHAPES_7B = {"gate_proj": (18944, 3584), "down_proj": (3584, 18944), "o_proj": (3584, 3584), "k_proj": (512, 3584)}
SHAPES_SMALL = {"gate_proj": (192, 128), "down_proj": (128, 192)}  # to try this where there is no card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", default="7")
    parser.add_argument("--repeat", type=int, default=10)
    asked = parser.parse_args()
    counts = [int(word) for word in asked.tokens.split(",")]
    print(json.dumps(SIDES[asked.side](asked.model, asked.device, counts, asked.repeat)))


def seconds(run: Callable[[], Any], repeat: int) -> float:
    """The median of `repeat` runs after some that warm up. `run` must not return before the device is done."""
    times = []
    for _ in range(WARM + repeat):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[WARM:])


def session(model: str, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """A resident model; also the seconds it takes to load it and the bytes of parameters that a forward reads."""
    from jaxref.devices import prepare

    prepare(device)
    import jax

    from jaxref.home import to_numpy
    from jaxref.session import Session

    begun = time.perf_counter()
    with Session(model, device=device) as resident:
        found: dict[str, Any] = {"load": time.perf_counter() - begun, "parameters": resident._source.nbytes}
        for count in counts:
            ids = list(range(1, count + 1))
            found[str(count)] = {
                "resident": seconds(lambda ids=ids: jax.block_until_ready(resident.forward(ids)), repeat),
                "home": seconds(lambda ids=ids: to_numpy(resident.forward(ids)), repeat),
            }
        return found | peak(resident.device)


def jit(model: str, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """One program for the whole model, its parameters on the device as they are stored; "compile" is in seconds."""
    from jaxref.devices import find_devices, prepare

    prepare(device)
    import jax
    import numpy as np

    import jaxref
    from jaxref.home import to_numpy
    from weights import open_checkpoint

    place, checkpoint = find_devices(device)[0], open_checkpoint(model)
    found: dict[str, Any] = {}
    with jax.default_device(place):
        params = jax.device_put(checkpoint.params(), place)
        for count in counts:
            tokens = np.arange(1, count + 1)
            begun = time.perf_counter()
            forward = jax.jit(jaxref.forward, static_argnums=2)
            jax.block_until_ready(forward(params, tokens, checkpoint.config))
            compiled = time.perf_counter() - begun
            run = partial(forward, params, tokens, checkpoint.config)
            found[str(count)] = {
                "compile": compiled,
                "resident": seconds(lambda run=run: jax.block_until_ready(run()), repeat),
                "home": seconds(lambda run=run: to_numpy(run()), repeat),
            }
    return found | peak(place)


def hf(model: str, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """Hugging Face eager with hooks. TF32 is off, as PyTorch has it unless asked."""
    import torch

    from oracle import hf as path

    assert not torch.backends.cuda.matmul.allow_tf32
    loaded, found = path.load(model, "float32", device), {}
    for count in counts:
        ids = list(range(1, count + 1))
        found[str(count)] = {
            "resident": seconds(lambda ids=ids: _hooked(path, loaded, ids, home=False), repeat),
            "home": seconds(lambda ids=ids: _hooked(path, loaded, ids, home=True), repeat),
        }
    return found | {"peak": torch.cuda.max_memory_allocated() if device == "cuda" else None}


def _hooked(path: Any, model: Any, ids: list[int], *, home: bool) -> None:
    import torch

    kept: list[torch.Tensor] = []
    path.run(model, ids, lambda layer, stage, value: kept.append(value.cpu() if home else value))
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(model: str | None, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """Bytes a second that the device's memory reads and writes: a gigabyte copied on it."""
    from jaxref.devices import find_devices, prepare

    prepare(device)
    import jax
    import jax.numpy as jnp

    place = find_devices(device)[0]
    size = 1 << (30 if device == "cuda" else 26)
    values = jax.device_put(jnp.ones(size // 4, jnp.float32), place)
    copied = jax.jit(lambda x: x + 1)
    # One behind another, so that to start them costs nothing.
    several = seconds(lambda: [copied(values) for _ in range(COPIES)][-1].block_until_ready(), repeat)
    return {"bytes_a_second": 2 * size * COPIES / several}


def products(model: str | None, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """Seconds of products of the 7B's shapes: as one card makes them of bfloat16 weights, and XLA's of float32 ones."""
    from jaxref import ops
    from jaxref.precision import numerics_of

    numerics = numerics_of("float32")
    with _operands(device, counts) as (place, operands):
        return {
            name: {
                "stored": _each(partial(ops.linear, numerics=numerics.on(place)), x, stored, repeat),
                "float32": _each(partial(ops.linear, numerics=numerics), x, wide, repeat),
            }
            for name, x, wide, stored in operands
        }


def tiles(model: str | None, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """Seconds of the kernel for few rows and bfloat16 weights, by block, warps and steps ahead: its own, the best."""
    from jaxref import few_rows

    found, interpret = {}, device == "cpu"
    with _operands(device, counts) as (_, operands):
        for name, x, _, stored in operands:
            own = few_rows.tiles_for(stored[0].shape[0], x.dtype.itemsize, stored[0].dtype.itemsize)
            tried = {
                each: _each(partial(few_rows.tiled, tiles=each, interpret=interpret), x, stored, repeat)
                for each in {own, *map(few_rows.Tiles._make, product((2, 4, 8), (1, 2, 4), (4, 8)))}
            }
            best = sorted(tried, key=lambda each: tried[each])[:5]
            found[name] = {" ".join(map(str, each)): tried[each] for each in [own, *best]}
    return found


@contextmanager
def _operands(device: str, counts: list[int]) -> Iterator[tuple[Any, Iterator[tuple[str, Any, Any, Any]]]]:
    """The device; of each shape a name, `x`, and weights in float32 and in bfloat16, so many that none is cached."""
    from jaxref.devices import find_devices, prepare

    prepare(device)
    import jax
    import jax.numpy as jnp

    def made() -> Iterator[tuple[str, Any, Any, Any]]:
        for count, (name, shape) in product(counts, (SHAPES_7B if device == "cuda" else SHAPES_SMALL).items()):
            x = jax.random.normal(jax.random.key(0), (count, shape[1]))
            wide = [jax.random.normal(jax.random.key(1 + i), shape) / shape[1] ** 0.5 for i in range(COPIES)]
            yield f"{name}, {count} tokens", x, wide, [weight.astype(jnp.bfloat16) for weight in wide]

    place = find_devices(device)[0]
    with jax.default_device(place):
        yield place, made()


def _each(multiply: Callable[..., Any], x: Any, weights: list[Any], repeat: int) -> float:
    """Seconds a product, all of them in one program: to start them one by one would take longer than they do."""
    import jax

    together = jax.jit(lambda x, weights: [multiply(x, weight) for weight in weights])
    return seconds(lambda: jax.block_until_ready(together(x, weights)), repeat) / len(weights)


def peak(device: Any) -> dict[str, Any]:
    """The most memory that this process had on the device, where JAX knows it."""
    return {"peak": (device.memory_stats() or {}).get("peak_bytes_in_use")}


SIDES = {"session": session, "jit": jit, "hf": hf, "bandwidth": bandwidth, "products": products, "tiles": tiles}

if __name__ == "__main__":
    main()
