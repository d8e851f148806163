"""Several devices as one: which axis of which parameter is split among them.

The stages stay as they are. JAX's partitioner sees how the parameters lie, splits the products accordingly and adds up
what the devices hold in parts. The layout is the usual one of tensor parallelism (arXiv:1909.08053): what makes heads
or inner columns is split by its rows, what takes them in by its columns; the head is split by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxref.devices import find_devices
from jaxref.precision import Device
from weights import Config, UserError

TENSOR = "tp"
# Part of a parameter's name -> the axis that is split. What is not here is small, and each device has all of it.
SPLIT_AXIS = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
    "embed_tokens": 0,  # only where it is the head
}


def parse_mesh(text: str) -> dict[str, int]:
    """`tp=4` as {"tp": 4}. Raises `UserError` for another grammar, another axis or a count below one."""
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, count = (part.strip() for part in word.partition("="))
        if not count.isdecimal() or int(count) < 1 or name in sizes:
            raise UserError(f"mesh {text!r}: NAME=N was expected, for example tp=4")
        if name != TENSOR:
            raise UserError(f"mesh {text!r}: there is no axis {name!r}; tp splits heads, feed-forward and vocabulary")
        sizes[name] = int(count)
    return sizes


def platform_of(place: Any) -> str:
    """The platform of a device, of a mesh, or (None) of where JAX would compute anyway: "cpu" or another."""
    device = place.devices.flat[0] if isinstance(place, Mesh) else place or jax.devices()[0]
    return device.platform


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of the first of these devices.

    Raises `UserError` where they are too few, or where a process of several has none of them.
    """
    wanted = int(np.prod(list(sizes.values())))
    if wanted > len(devices):
        platform = devices[0].platform
        hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes as many" if platform == "cpu" else ""
        raise UserError(f"mesh {mesh_text(sizes)}: needs {wanted} devices, JAX finds {len(devices)} ({platform}){hint}")
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:wanted]}:
        raise UserError(
            f"mesh {mesh_text(sizes)}: process {min(idle)} has none of its devices; tp={len(devices)} takes all of them"
        )
    grid = np.asarray(devices[:wanted]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_text(sizes: Mapping[str, int]) -> str:
    """A mesh as people type it."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def split_axis(name: str, shape: tuple[int, ...], config: Config, ways: int) -> int | None:
    """The axis of a parameter (by its checkpoint name) that is split `ways` ways; None: each device has all of it.

    Heads are never cut: q and o are split where the ways divide H, k and v where they divide K.
    """
    part = name.split(".")[-2]
    axis = SPLIT_AXIS.get(part)
    if axis is None or ways == 1:
        return None
    heads = {"q_proj": config.num_attention_heads, "o_proj": config.num_attention_heads}
    heads |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads)
    return axis if heads.get(part, shape[axis]) % ways == 0 else None


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...], config: Config) -> NamedSharding:
    """How a parameter lies on the mesh."""
    axis = split_axis(name, shape, config, mesh.shape[TENSOR])
    return replicated(mesh) if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, TENSOR))


def put(copy: np.ndarray, place: Any) -> Array:
    """An array on a device, or placed by a sharding; of a mesh of several processes each puts its own part."""
    if isinstance(place, NamedSharding) and not place.is_fully_addressable:
        return jax.make_array_from_callback(copy.shape, place, copy.__getitem__)  # `device_put` would compare them all
    return jax.device_put(copy, place)


def to_host(value: Array | np.ndarray) -> np.ndarray:
    """A value in NumPy. One that lies split among several processes is brought to each of them, all together."""
    if isinstance(value, Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        mesh = value.sharding.mesh  # type: ignore[attr-defined]  # a NamedSharding's, as all that a mesh's programs give
        value = jax.device_put(value, replicated(mesh))
    return np.asarray(value)


def here(devices: Iterable[Any]) -> Any:
    """The first of these devices that is this process's own."""
    return next(device for device in devices if device.process_index == jax.process_index())


def replicated(mesh: Mesh) -> NamedSharding:
    """All of it on each device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(device: str | Device | None, mesh: str | Mesh | None) -> tuple[Device, Mesh | None]:
    """The device, which of a mesh is its first, and the mesh. Raises `UserError` where there is none such."""
    if isinstance(mesh, Mesh):
        if TENSOR not in mesh.shape or mesh.size != mesh.shape[TENSOR]:
            raise UserError(f"the mesh has the axes {dict(mesh.shape)}; one axis {TENSOR!r} was expected")
        return mesh.devices.flat[0], mesh
    if device is None or isinstance(device, str):
        devices = jax.devices() if device is None else find_devices(device)
    else:
        devices = [device]
    if mesh is not None:
        made = make_mesh(parse_mesh(mesh), devices)
        return made.devices.flat[0], made
    return devices[0], None
