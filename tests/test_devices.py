"""Where a run computes: what is set for it, and what is said where there is no such device."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import jax
import pytest

from jaxref import devices
from jaxref.devices import CUDA_FLAGS, find_devices, out_of_memory_in_words, prepare
from tests.commands import refused
from weights import UserError


def test_what_is_set_for_a_gpu_and_what_is_kept(monkeypatch) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(devices.jax.config, "update", lambda *words: seen.append(words))
    environment: dict[str, str] = {}
    prepare("cpu", environment)
    prepare("cpu", {"JAX_PLATFORMS": "cuda,cpu"})
    assert (seen, environment) == ([("jax_platforms", "cpu")], {})
    prepare("cuda", environment)
    assert environment == {
        "XLA_FLAGS": " ".join(CUDA_FLAGS),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.95",
    }
    flags = "--a --xla_gpu_deterministic_ops=false --xla_gpu_enable_triton_gemm=1 --xla_gpu_dot_merger_threshold_mb=9"
    kept = {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    kept |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    environment = dict(kept)
    prepare("cuda", environment)
    assert environment == kept
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    prepare("cuda", environment)
    assert environment["XLA_FLAGS"].split() == ["--xla_dump_to=x", *CUDA_FLAGS]


def test_the_command_line_sets_it_before_jax_starts_and_an_import_does_not() -> None:
    """XLA ends the process where a flag is unknown to it, so this also shows that the installed one knows it."""
    script = """
import os, jax, jaxref, jaxref.__main__ as cli
from jax._src import xla_bridge
from jaxref.devices import CUDA_FLAGS
assert "XLA_FLAGS" not in os.environ
seen, find = [], jax.devices
def watched(*names):
    seen.append((os.environ.get("XLA_FLAGS"), xla_bridge.backends_are_initialized()))
    return find(*names)
jax.devices = watched
try:
    cli.main(["dump", "tiny", "--device", "cuda", "--output", "/nowhere/at/all"], standalone_mode=False)
except Exception as error:
    assert "JAX finds none" in str(error), error
assert seen == [(" ".join(CUDA_FLAGS), False)], seen
find("cpu")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=clean_environment())


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def test_a_full_device_is_one_line() -> None:
    with pytest.raises(UserError, match="memory is full"), out_of_memory_in_words():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_in_words():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize(
    ("platforms", "words", "says"),
    [
        ("cuda", ["jaxref", "dump", "--output", "x"], "--device cpu: JAX finds none"),
        ("nonsense", ["jaxref", "generate"], "--device cpu: JAX finds none (Unable to initialize backend 'nonsense'"),
        ("nonsense", ["oracle", "plant", "--fault", "kv_heads_modulo", "--output", "x"], "unset it, or set it to cpu"),
        ("nonsense", ["oracle", "explain", "tiny", "tree"], "JAX_PLATFORMS=nonsense says where it looks"),
    ],
)
def test_a_platform_without_a_device_is_one_line(tmp_path, monkeypatch, platforms: str, words: list, says: str) -> None:
    if "explain" in words:
        done = subprocess.run([sys.executable, "-m", "jaxref", "dump", "--quiet", "--output", tmp_path / "tree"])
        assert done.returncode == 0
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    module, *rest = [str(tmp_path / word) if word in ("x", "tree") else word for word in words]
    assert says in refused(*rest, module=module)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("plugin", [True, False])
def test_a_driver_that_does_not_start_is_told_without_jax_s_traceback(monkeypatch, caplog, plugin: bool) -> None:
    """JAX logs what a plugin raises, with a traceback, and then does not know its platform."""

    def find(name: str) -> None:
        try:
            raise RuntimeError("cuInit(0) failed:\n  no driver")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")
        raise RuntimeError(f"Unknown backend {name}")

    monkeypatch.setattr(devices.jax, "devices", find)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: plugin or None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with pytest.raises(UserError) as refusal:
        find_devices("cuda")
    advice = "`nvidia-smi` tells whether there is a card" if plugin else "pip install 'jaxref[cuda12]' brings CUDA"
    assert str(refusal.value) == f"--device cuda: JAX finds none (cuInit(0) failed: no driver); {advice}"
    assert not caplog.records
