"""Every stage compiled for an NVIDIA card that need not be there: what is in the machine code, and its memory.

    python -m tests.gpu.compiled [--card H100]

XLA's CUDA compiler runs without a card and without a driver; it is in the plugin (`pip install 'jaxref[cuda12]'`).
Flags are those of `--device cuda`. A program's products may be calls of cuBLAS, which is no part of the machine code:
of those, XLA's own settings are shown. Prints one JSON object: "programs", each with its calls, the precisions of its
products, the bytes it takes beside inputs and outputs and the bytes planned for them; and "instructions", how often
each of PTX's that says something about precision or order occurs in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.cards import CARDS, target

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Products by matrix units, sums by atomics, and functions that are not computed to the last bit.
TOLD = re.compile(r"\b((?:mma|wgmma|atom|red|ex2|rsqrt|rcp|div|sqrt)\.[a-z0-9_.]+)")
WHOLE = ("qwen2", "qwen3", "moe")  # models whose forward is compiled as one program
LARGE = ("qwen2", "7b", 512)  # a shape and a number of tokens whose memory counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    with tempfile.TemporaryDirectory() as folder:
        place = _without_card(parser.parse_args().card, Path(folder))
        programs = [*_stages(place), *_large(place), *_whole(place)]
        print(json.dumps({"programs": programs, "instructions": _instructions(Path(folder))}))


def _without_card(card: str, folder: Path) -> Any:
    """Where to compile for; what is compiled leaves its PTX in `folder`. Before JAX's backend starts."""
    from jaxref.devices import prepare

    prepare("cuda")
    os.environ["XLA_FLAGS"] += f" --xla_dump_to={folder} --xla_dump_hlo_as_text=false"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks the driver
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    jax.config.update("jax_platforms", "cpu")
    devices = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=target(card)).devices
    return SingleDeviceSharding(devices[0])


def _stages(place: Any) -> Iterator[dict[str, Any]]:
    """Every stage of every kind of model in every precision."""
    from tests.test_lowered import cases, config_of

    for dtype in DTYPES:
        for name, key in cases():
            yield _stage(config_of(name), key, dtype, 64, place) | {"model": name}


def _large(place: Any) -> Iterator[dict[str, Any]]:
    """The stages of a layer of the 7B and its head."""
    from jaxref.stages import keys_of
    from weights import config_from_dict
    from weights.tiny import tiny_config

    arch, like, count = LARGE
    config = config_from_dict(tiny_config(arch, like, 1))
    for dtype in DTYPES:
        for key in keys_of(config):
            if key[1] not in ("embedding", "lm_head"):  # whose tables are never on the device as a whole
                yield _stage(config, key, dtype, count, place) | {"model": like}


def _stage(config: Any, key: Any, dtype: str, count: int, place: Any) -> dict[str, Any]:
    from jaxref.memory import GPU_WORKSPACE, stage_work
    from jaxref.precision import numerics_of
    from jaxref.stages import STAGES
    from tests.test_lowered import abstract

    numerics, stage = numerics_of(dtype), STAGES[key[1]]
    with numerics.context():
        lowered = abstract(stage, config, key[0], numerics, count, place).lower()
        planned = stage_work(stage, config, key[0], count, numerics) + GPU_WORKSPACE
        return _told(lowered) | {"stage": key[1], "dtype": dtype, "planned": planned}


def _whole(place: Any) -> Iterator[dict[str, Any]]:
    """`jax.jit(jaxref.forward)`."""
    import jax
    import jax.numpy as jnp

    import jaxref
    from tests.test_lowered import config_of
    from weights import random_params

    def shaped(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)

    for name in WHOLE:
        config = config_of(name)
        params = jax.tree.map(shaped, jax.eval_shape(lambda c=config: jax.tree.map(jnp.asarray, random_params(c))))
        tokens = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=place)
        yield _told(jax.jit(jaxref.forward).lower(params, tokens, config)) | {"stage": "forward", "model": name}


def _told(lowered: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    compiled = lowered.compile()
    text = compiled.as_text()
    return {
        "calls": Counter(re.findall(r'custom_call_target="([^"]+)"', text)),
        "precisions": Counter(re.findall(r'operand_precision[="]*[:{\[]+([^}\]]+)[}\]]', text)),
        "seconds": time.perf_counter() - begun,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def _instructions(folder: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.ptx")):
        found.update(TOLD.findall(path.read_text(encoding="utf-8")))
    return dict(found)


if __name__ == "__main__":
    main()
