"""The device a run computes on: found by name, its memory, its settings, and its errors in words for people."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from jaxref.malloc import keep_freed_memory
from jaxref.precision import Device
from weights import UserError
from weights.errors import plain

# Run to run the same bits: no atomics, and the first algorithm instead of the one that happened to be the fastest.
# Of a product the first would be one of Triton's with tiles of 16 × 8; without those it is the one that cuBLAS picks.
# And the products of q, k and v stay three: to make one of them, XLA would copy their weights each time.
CUDA_FLAGS = (
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_dot_merger_threshold_mb=0",
)
FREE_SHARE = 0.9  # of a device's free memory, where no bound is given
UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def prepare(name: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Settle what JAX and XLA read once, when their backend starts; what the user has set is kept.

    For command lines: a library must not change its host's settings.
    """
    keep_freed_memory()
    if name != "cuda":
        if not environment.get("JAX_PLATFORMS"):
            jax.config.update("jax_platforms", name)  # else JAX would take memory of a GPU that is not asked for
        return
    flags = environment.get("XLA_FLAGS", "")
    missing = [flag for flag in CUDA_FLAGS if flag.split("=")[0] not in flags]
    environment["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    # JAX would take three quarters of the card at once: --max-device-memory would bound nothing, and an engine that
    # runs beside us would find no room. It may grow to 95 %, since 90 % of what is free are to be usable.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:  # the older name; both at once are an error
        environment.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")


def find_devices(name: str) -> list[Any]:
    """All devices of "cpu" or "cuda" as JAX knows them, at least one. Raises `UserError` where there is none."""
    with _plugin_errors() as said:
        try:
            return jax.devices(name)
        except (RuntimeError, AssertionError) as error:  # JAX asserts that some platform of JAX_PLATFORMS started
            reason = " ".join(str(said[0] if said else error).split()) or "no backend started"
            raise UserError(f"--device {name}: JAX finds none ({plain(reason)}); {_advice(name)}") from None


def _advice(name: str) -> str:
    """What to look at where there is no such device."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and name not in asked.replace("gpu", "cuda").split(","):
        return f"JAX_PLATFORMS={asked} says where it looks: unset it, or set it to {name}"
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "`nvidia-smi` tells whether there is a card"
    return "pip install 'jaxref[cuda12]' brings CUDA"


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute on the CPU, whatever else there is; for command lines. Raises `UserError` where JAX has none."""
    prepare("cpu")
    with jax.default_device(find_devices("cpu")[0]):
        yield


@contextmanager
def _plugin_errors() -> Iterator[list[BaseException]]:
    """Why a plugin of JAX does not start, which JAX would log with a traceback."""
    said: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        found = record.exc_info[1] if record.exc_info else None
        if found is not None:
            said.append(found)
        return found is None

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield said
    finally:
        logger.removeFilter(keep)


def described(device: Device, mesh: Mesh | None) -> dict[str, Any]:
    """The device as the manifest has it; the mesh only where there is one."""
    found = {"platform": device.platform, "kind": device.device_kind, "cpus": os.cpu_count()}
    if mesh is None:
        return found
    processes = len({device.process_index for device in mesh.devices.flat})
    return found | {"mesh": dict(mesh.shape)} | ({"processes": processes} if processes > 1 else {})


def parse_size(text: str) -> int:
    """Bytes out of `8GB`, `512MiB` or a bare number. Raises `UserError` for anything else."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise UserError(f"size {text!r}: a number of bytes was expected, for example 8GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def memory_limit(device: Device, asked: int | None) -> int | None:
    """Bytes that a run may take of a device: as asked, else 90 % of what is free; None where JAX does not say."""
    if asked is not None:
        return asked
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(FREE_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))


@contextmanager
def out_of_memory_in_words() -> Iterator[None]:
    """Turn JAX's error for a full device into a `UserError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device's memory is full: another program may use it; a smaller --max-device-memory, fewer tokens or"
            " --mesh need less"
        ) from error
