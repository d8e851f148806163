"""One side of the GPU benchmark, in a process of its own so that its memory is given back: prints one JSON object.

    python -m tests.gpu.bench {session,jit,hf,bandwidth,products} [MODEL] [--device cuda] [--tokens 7] [--repeat 10]

`session` is `jaxref.Session.forward`, `jit` is `jax.jit(jaxref.forward)`, `hf` Hugging Face eager with hooks. All are
in float32 and make every stage. "resident": the values stay on the device; "home": they come to the host as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

WARM = 3  # runs before the first that counts
COPIES = 8  # that a measurement of the bandwidth makes, and of a product's weights
SHAPES_7B = {"gate_proj": (18944, 3584), "down_proj": (3584, 18944), "o_proj": (3584, 3584), "k_proj": (512, 3584)}


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

    from jaxref.session import Session

    begun = time.perf_counter()
    with Session(model, device=device) as resident:
        found: dict[str, Any] = {"load": time.perf_counter() - begun, "parameters": resident._source.nbytes}
        for count in counts:
            ids = list(range(1, count + 1))
            found[str(count)] = {
                "resident": seconds(lambda ids=ids: jax.block_until_ready(resident.forward(ids)), repeat),
                "home": seconds(lambda ids=ids: jax.device_get(resident.forward(ids)), repeat),
            }
        return found | peak(resident.device)


def jit(model: str, device: str, counts: list[int], repeat: int) -> dict[str, Any]:
    """One program for the whole model, its parameters on the device as they are stored; "compile" is in seconds."""
    from jaxref.devices import find_devices, prepare

    prepare(device)
    import jax
    import numpy as np

    import jaxref
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
                "home": seconds(lambda run=run: jax.device_get(run()), repeat),
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
    from jaxref.devices import find_devices, prepare

    prepare(device)
    import jax
    import jax.numpy as jnp

    from jaxref import ops
    from jaxref.precision import numerics_of

    place, numerics, found = find_devices(device)[0], numerics_of("float32"), {}
    with jax.default_device(place):
        for count, (name, shape) in product(counts, SHAPES_7B.items()):
            x = jax.random.normal(jax.random.key(0), (count, shape[1]))
            # Several, so that none is in the cache, one behind another, so that to start them costs nothing.
            wide = [jax.random.normal(jax.random.key(1 + i), shape) / shape[1] ** 0.5 for i in range(COPIES)]
            stored = [weight.astype(jnp.bfloat16) for weight in wide]
            row = found.setdefault(str(count), {})[name] = {}
            for side, weights, way in (("stored", stored, numerics.on(place)), ("float32", wide, numerics)):
                run = partial(_all_of, partial(ops.linear, x, numerics=way), weights)
                row[side] = seconds(run, repeat) / COPIES
    return found


def _all_of(run: Callable[[Any], Any], weights: list[Any]) -> None:
    [run(weight) for weight in weights][-1].block_until_ready()


def peak(device: Any) -> dict[str, Any]:
    """The most memory that this process had on the device, where JAX knows it."""
    return {"peak": (device.memory_stats() or {}).get("peak_bytes_in_use")}


SIDES = {"session": session, "jit": jit, "hf": hf, "bandwidth": bandwidth, "products": products}

if __name__ == "__main__":
    main()
