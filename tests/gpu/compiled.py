"""Every stage compiled for an NVIDIA card that need not be there: what is in the machine code, and its memory.

    python -m tests.gpu.compiled [--card H100]

XLA's CUDA compiler runs without a card and without a driver; it is in the plugin (`pip install 'jaxref[cuda12]'`).
Flags are those of `--device cuda`. A program's products may be calls of cuBLAS, which is no part of the machine code:
of those, XLA's own settings are shown. Prints one JSON object: "programs", each with its calls, the precisions of its
products, the bytes it takes beside inputs and outputs and the bytes planned for them; "split", the same of a model
that four cards share, with what goes between them; and "instructions", how often each of PTX's occurs that says
something about precision or order. "short" are the stages of a few tokens with parameters as they are stored, whose
products are kernels of jaxref's own; "whole" are `jax.jit(jaxref.forward)` and what a resident model runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from tests.gpu.cards import CARDS, mesh_of, target

DTYPES = ("float32", "float64", "float16", "bfloat16")
BETWEEN = re.compile(r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
# Products by matrix units, sums by atomics, and functions that are not computed to the last bit.
TOLD = re.compile(r"\b((?:mma|wgmma|atom|red|ex2|rsqrt|rcp|div|sqrt)\.[a-z0-9_.]+)")
WHOLE = ("qwen2", "qwen3", "moe")  # models whose forward is compiled as one program
SHORT = 7  # tokens, whose products have a kernel of their own
LARGE = ("qwen2", "7b", 512)  # a shape and a number of tokens whose memory counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    with tempfile.TemporaryDirectory() as folder:
        name = parser.parse_args().card
        cards = _without_cards(name, Path(folder))
        told = {"programs": [*_stages(cards[0]), *_large(cards[0])], "split": [*_split(cards)]}
        with _known_to_pallas(name):
            told |= {"short": [*_short(cards[0])], "whole": [*_whole(cards[0]), *_resident(cards[0])]}
        print(json.dumps(told | {"instructions": _instructions(Path(folder))}))


def _without_cards(card: str, folder: Path) -> list[Any]:
    """Four of them to compile for; what is compiled leaves its PTX in `folder`. Before JAX's backend starts."""
    from jaxref.devices import prepare

    prepare("cuda")
    os.environ["XLA_FLAGS"] += f" --xla_dump_to={folder} --xla_dump_hlo_as_text=false --xla_dump_emitter_re=ptx"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks the driver
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    return topologies.get_topology_desc("", "cuda", topology="1x1x4", target_config=target(card)).devices


def _known_to_pallas(card: str) -> AbstractContextManager[Any]:
    """Pallas asks for the kind of the card before XLA does."""
    from jax.sharding import use_abstract_mesh

    return use_abstract_mesh(mesh_of(f"NVIDIA {card}"))


def _stages(card: Any) -> Iterator[dict[str, Any]]:
    """Every stage of every kind of model in every precision."""
    from tests.test_lowered import cases, config_of

    for dtype in DTYPES:
        for name, key in cases():
            yield _stage(config_of(name), key, dtype, 64, _on(card)) | {"model": name}


def _large(card: Any) -> Iterator[dict[str, Any]]:
    """The stages of a layer of the 7B."""
    config, keys = _large_shape()
    for dtype in DTYPES:
        for key in keys:
            yield _stage(config, key, dtype, LARGE[2], _on(card)) | {"model": LARGE[1]}


def _split(cards: list[Any]) -> Iterator[dict[str, Any]]:
    """The same, for four cards that share the parameters."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from jaxref.mesh import TENSOR, replicated, sharding

    config, keys = _large_shape()
    mesh = Mesh(np.array(cards), (TENSOR,), axis_types=(AxisType.Auto,))

    def where(name: str, shape: tuple[int, ...]) -> Any:
        return sharding(mesh, name, shape, config) if name else replicated(mesh)

    for key in keys:
        yield _stage(config, key, "float32", LARGE[2], where)


def _short(card: Any) -> Iterator[dict[str, Any]]:
    """The stages of a layer of the 7B for few tokens, of a checkpoint in bfloat16."""
    config, keys = _large_shape()
    for dtype in DTYPES:
        for key in keys:
            yield _stage(config, key, dtype, SHORT, _on(card), stored="bfloat16")


def _large_shape() -> tuple[Any, list[Any]]:
    """The config and the stages but for those of the tables, which are never on a device as a whole."""
    from jaxref.stages import keys_of
    from weights import config_from_dict
    from weights.tiny import tiny_config

    config = config_from_dict(tiny_config(*LARGE[:2], 1))
    return config, [key for key in keys_of(config) if key[1] not in ("embedding", "lm_head")]


def _on(card: Any) -> Callable[[str, tuple[int, ...]], Any]:
    from jax.sharding import SingleDeviceSharding

    return lambda name, shape: SingleDeviceSharding(card)


def _stage(
    config: Any, key: Any, dtype: str, count: int, where: Callable[..., Any], stored: str | None = None
) -> dict[str, Any]:
    """One stage; with `stored` as one card runs it that keeps parameters as they are."""
    import jax.numpy as jnp

    from jaxref.memory import GPU_WORKSPACE, stage_work
    from jaxref.precision import numerics_of
    from jaxref.stages import STAGES
    from tests.test_lowered import abstract

    numerics, stage = replace(numerics_of(dtype), gpu=stored is not None), STAGES[key[1]]
    kept = numerics.kept(jnp.dtype(stored or dtype))
    with numerics.context():
        lowered = abstract(stage, config, key[0], numerics, count, where, kept).lower()
        planned = stage_work(stage, config, key[0], count, numerics, kept) + GPU_WORKSPACE
        return _told(lowered) | {"stage": key[1], "dtype": dtype, "planned": planned}


def _whole(card: Any) -> Iterator[dict[str, Any]]:
    """`jax.jit(jaxref.forward)`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    import jaxref
    from tests.test_lowered import config_of
    from weights import random_params

    def shaped(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=SingleDeviceSharding(card))

    for name in WHOLE:
        config = config_of(name)
        params = jax.eval_shape(lambda c=config: jax.tree.map(jnp.asarray, random_params(c)))
        tokens = shaped(jnp.zeros(64, jnp.int32))
        lowered = jax.jit(jaxref.forward).lower(jax.tree.map(shaped, params), tokens, config)
        yield _told(lowered) | {"stage": "forward", "model": name}


def _resident(card: Any) -> Iterator[dict[str, Any]]:
    """What `jaxref.Session` runs for two layers of the 7B in bfloat16, few tokens and many."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from jaxref.memory import plan_memory
    from jaxref.model import head_rows
    from jaxref.precision import numerics_of
    from jaxref.selection import Selection, parse_layers, parse_stages
    from jaxref.session import _program
    from weights import config_from_dict
    from weights.names import layer_shapes
    from weights.params import layer_names
    from weights.tiny import tiny_config

    config = config_from_dict(tiny_config(*LARGE[:2], 2))

    def shaped(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(card))

    sizes, width, vocab, rows = layer_shapes(config, 0), config.hidden_size, config.vocab_size, head_rows(config, "gpu")
    blocks = [(min(rows, vocab - start), width) for start in range(0, vocab, rows)]
    everything = parse_stages("all", config), parse_layers("all", 2), "all"
    for dtype, count in product(DTYPES, (SHORT, LARGE[2])):
        numerics = replace(numerics_of(dtype), gpu=True)
        kept = numerics.kept(jnp.dtype("bfloat16"))
        layer = jax.tree.map(lambda name, kept=kept: shaped(sizes[name], kept), layer_names(config, 0))
        head = [shaped(block, kept) for block in blocks]
        with numerics.context():
            hidden = shaped((count, width), numerics.compute)
            lowered = _program.lower(hidden, [layer, layer], shaped((width,), kept), head, config, numerics)
            plan = plan_memory(Selection(config, count, *everything), numerics, platform="cuda", stored=kept)
            planned = max(plan.activations, plan.logits) + count * vocab * numerics.compute.itemsize
            yield _told(lowered) | {"stage": "program", "count": count, "dtype": dtype, "planned": planned}


def _told(lowered: Any) -> dict[str, Any]:
    compiled = lowered.compile()
    text = compiled.as_text()
    return {
        "calls": Counter(re.findall(r'custom_call_target="([^"]+)"', text)),
        "precisions": Counter(re.findall(r'operand_precision[="]*[:{\[]+([^}\]]+)[}\]]', text)),
        "between_cards": Counter(BETWEEN.findall(text)),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def _instructions(folder: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.ptx")):
        found.update(TOLD.findall(path.read_text(encoding="utf-8")))
    return dict(found)


if __name__ == "__main__":
    main()
