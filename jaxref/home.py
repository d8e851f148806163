"""A trace brought from its device to the host: a copy a layer in place of a copy a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxref.model import Trace

# Bytes of a value up to which its copy takes less time than to ask for it, so that it goes along with others.
SMALL = 1 << 20

Arrival = Callable[[], dict[str, np.ndarray]]


def to_numpy(trace: Trace) -> dict[str, Any]:
    """What `jaxref.forward` or a `Session` gave, in NumPy arrays of the same names, shapes, dtypes and bits.

    From a GPU a layer's small stages come as one buffer, of which each is a view; on a CPU nothing is copied. The
    arrays are read-only, as NumPy's views of JAX arrays are.
    """
    coming = [(name, _leave(part if isinstance(part, Mapping) else {name: part})) for name, part in trace.items()]
    arrived = {name: arrive() for name, arrive in coming}
    return {name: part if isinstance(trace[name], Mapping) else part[name] for name, part in arrived.items()}


def _leave(stages: Mapping[str, Array | np.ndarray]) -> Arrival:
    """Begin to copy the values, all of them before any is waited for; the result waits."""
    boxes: dict[np.dtype[Any], list[str]] = {}
    for stage, value in stages.items():
        if _is_small_elsewhere(value):
            boxes.setdefault(value.dtype, []).append(stage)
    packed = {dtype: _pack([stages[stage] for stage in inside]) for dtype, inside in boxes.items()}
    along = {stage for inside in boxes.values() for stage in inside}
    alone = {stage: value for stage, value in stages.items() if stage not in along}
    for value in [*packed.values(), *alone.values()]:
        if isinstance(value, Array):
            value.copy_to_host_async()

    def arrive() -> dict[str, np.ndarray]:
        found = {stage: np.asarray(value) for stage, value in alone.items()}
        for dtype, inside in boxes.items():
            ends = np.cumsum([stages[stage].size for stage in inside])
            parts = np.split(np.asarray(packed[dtype]), ends[:-1])
            found |= {s: part.reshape(stages[s].shape) for s, part in zip(inside, parts, strict=True)}
        return {stage: found[stage] for stage in stages}

    return arrive


def _is_small_elsewhere(value: Array | np.ndarray) -> bool:
    """Whether a value lies on one device that is no CPU, and is small."""
    if not isinstance(value, Array) or value.nbytes > SMALL:
        return False
    platforms = [device.platform for device in value.devices()]
    return len(platforms) == 1 and platforms != ["cpu"]


def _pack(values: list[Any]) -> Array:
    with jax.enable_x64(True):  # or float64 would be narrowed on the way
        return _joined(values)


@jax.jit
def _joined(values: list[Array]) -> Array:
    return jnp.concatenate([value.ravel() for value in values])
