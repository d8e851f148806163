"""The tests of this folder need an NVIDIA GPU that JAX can use; without one they are skipped, with the reason.

JAXREF_GPU_DEVICE=cpu runs them on the CPU, which shows that they themselves work.
"""

from __future__ import annotations

import importlib.util

import pytest

from jaxref.devices import find_devices, prepare
from tests.gpu.device import DEVICE
from weights import UserError

HAS_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU that JAX can use")
    if HAS_PLUGIN and DEVICE == "cuda":
        prepare("cuda")  # before JAX's backend starts; without a plugin there is none to set up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.get_closest_marker("gpu")]  # the folder's name is a keyword too
    if here and (reason := missing()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing() -> str | None:
    """Why there is no device to run on; None where there is one."""
    try:
        find_devices(DEVICE)
    except UserError as error:
        return str(error)
    return None
