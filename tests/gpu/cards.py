"""NVIDIA cards in the figures that XLA's compiler asks for, so that it can compile for one that is not there.

The names are those of XLA's `GpuTargetConfigProto`. Sources: NVIDIA's H100 and A100 white papers, and the table of
compute capabilities in the CUDA programming guide.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

_ALL: dict[str, Any] = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 << 10,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_address_bits": 64,
    "device_vendor": "NVIDIA Corporation",
    "driver_version": "13.0.0",
    "runtime_version": "12.9.0",
    "compile_time_toolkit_version": "12.9.0",
    "dnn_version": "9.10.0",
}
CARDS: dict[str, dict[str, Any]] = {
    "H100": {
        "cuda_compute_capability": {"major": 9, "minor": 0},
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 3_352_000_000_000,
        "device_memory_size": 80 << 30,
        "l2_cache_size": 50 << 20,
        "shared_memory_per_core": 228 << 10,
        "shared_memory_per_block_optin": 227 << 10,
    },
    "A100": {
        "cuda_compute_capability": {"major": 8, "minor": 0},
        "core_count": 108,
        "fpus_per_core": 64,
        "clock_rate_ghz": 1.41,
        "memory_bandwidth": 2_039_000_000_000,
        "device_memory_size": 80 << 30,
        "l2_cache_size": 40 << 20,
        "shared_memory_per_core": 164 << 10,
        "shared_memory_per_block_optin": 163 << 10,
    },
}


def target(card: str) -> str:
    """The text of the protocol buffer."""
    info = _ALL | CARDS[card] | {"name": f"NVIDIA {card}"}
    return _text(
        {
            "gpu_device_info": info,
            "platform_name": "CUDA",
            "dnn_version_info": {"major": 9, "minor": 10},
            "device_description_str": f"NVIDIA {card}",
        }
    )


def mesh_of(kind: str) -> Any:
    """What Pallas takes for the card that a program is for, where none is there."""
    from jax.sharding import AbstractDevice, AbstractMesh

    platform = {"platform": "gpu"} if "platform" in signature(AbstractDevice).parameters else {}  # not in JAX 0.8
    return AbstractMesh((), (), abstract_device=AbstractDevice(kind, None, **platform))


def _text(fields: dict[str, Any]) -> str:
    return "\n".join(_field(name, value) for name, value in fields.items())


def _field(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name} {{\n{_text(value)}\n}}"
    return f'{name}: "{value}"' if isinstance(value, str) else f"{name}: {value}"
