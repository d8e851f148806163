"""A resident model gives the bytes of a dump; and what a GPU needs of us, shown with stand-ins for one."""

from __future__ import annotations

import ctypes
import json
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import jax
import jaxtyping
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxref
from jaxref import dump as dumping
from jaxref import model, ops
from jaxref import reader as reading
from jaxref.precision import Numerics, numerics_of
from jaxref.reader import Reader
from jaxref.session import Session
from jaxref.stream import stream
from tests.conftest import ZOO, prompt
from tests.trees import flat, tree_bytes, write_tree
from weights import EMBEDDED, UserError, open_checkpoint
from weights.tiny import tiny_config, write_random

TOKENS = prompt(20, 272)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "moe-64"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_session_has_the_bytes_of_a_dump(zoo, tmp_path, name: str, dtype: str) -> None:
    folder = zoo(name)
    write_tree(folder, tmp_path / "tree", TOKENS, positions="all", dtype=dtype, form="safetensors")
    with Session(folder, dtype) as session:
        session.forward(TOKENS[:3])  # what came before leaves no trace
        trace = flat(session.forward(TOKENS))
    files = {str(p.relative_to(tmp_path / "tree").with_suffix("")): p for p in tmp_path.rglob("*.safetensors")}
    assert trace.keys() == files.keys()
    for key, path in files.items():
        (stored,) = load_file(path).values()
        assert (trace[key].dtype, trace[key].shape) == (stored.dtype, stored.shape), key
        assert trace[key].tobytes() == stored.tobytes(), key


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What a GPU is given, computed here: XLA takes its own products, for the kernel is for that platform alone."""
    monkeypatch.setattr(Numerics, "on", lambda self, device, mesh=None: replace(self, gpu=True))


@pytest.mark.parametrize("name", ["qwen2-window", "qwen3-linear", "moe"])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float16", "float64"), ("bfloat16", "float16")]
)
def test_on_a_gpu_it_is_one_program_with_the_same_bytes(
    tmp_path, monkeypatch, request, name: str, stored: str, dtype: str
) -> None:
    """Of a dense model; and parameters are kept as they are stored where that loses nothing."""
    arch, like, layers, changes = ZOO[name]
    write_random(tmp_path, tiny_config(arch, like, layers, **changes), seed=3, dtype=stored)
    with Session(tmp_path, dtype) as session:
        parameters, stages = session._source.nbytes, session.forward(TOKENS[:7])
    request.getfixturevalue("as_on_a_gpu")
    dispatched = count_calls(monkeypatch, ops, "rms_norm")
    with Session(tmp_path, dtype) as session:
        widened = np.dtype(dtype).itemsize // 2
        assert session._source.nbytes * widened == parameters
        program = session.forward(TOKENS[:7])
        assert (not dispatched) == (name != "moe")
    once, again = flat(stages), flat(program)
    assert list(once) == list(again)
    for key in once:
        assert (once[key].dtype, once[key].tobytes()) == (again[key].dtype, again[key].tobytes()), key


def count_calls(monkeypatch, module, name: str) -> list[str]:
    """The calls of a function from outside of a program, as they come."""
    made, function = [], getattr(module, name)

    def counted(*args, **options):
        made.extend([name] if not isinstance(args[0], jax.core.Tracer) else [])
        return function(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return made


def test_a_long_prompt_on_a_gpu_is_made_in_blocks(zoo, monkeypatch, as_on_a_gpu) -> None:
    with Session(zoo("qwen2")) as session:
        whole = flat(session.forward(TOKENS))
        monkeypatch.setattr(model, "SCORES_IN_BLOCK", 6 * 20 * 7)
        dispatched = count_calls(monkeypatch, ops, "rms_norm")
        blocks = flat(session.forward(TOKENS))
    assert dispatched
    for key, value in whole.items():
        np.testing.assert_allclose(blocks[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_of_query_rows_are_joined(zoo, monkeypatch, dtype: str) -> None:
    with Session(zoo("qwen2"), dtype) as session:
        whole = flat(session.forward(TOKENS))
        monkeypatch.setattr(model, "SCORES_IN_BLOCK", 6 * 20 * 7)
        blocks = flat(session.forward(TOKENS))
    assert blocks["layer-3/attn_softmax"].dtype == dtype
    for key, value in whole.items():
        np.testing.assert_allclose(blocks[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
        assert blocks[key].shape == value.shape


def test_a_session_writes_the_tree_of_the_command_line(zoo, tmp_path) -> None:
    folder = zoo("moe")
    write_tree(folder, tmp_path / "dumped", TOKENS, stages="moe_router,attn_scores,lm_head")
    with Session(folder) as session:
        report = session.dump(TOKENS, tmp_path / "session", stages="moe_router,attn_scores,lm_head")
        assert np.argmax(report.logits) == np.argmax(session.forward(TOKENS)["lm_head"][-1])
    assert tree_bytes(tmp_path / "session") == tree_bytes(tmp_path / "dumped")
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("session", "dumped")]
    assert manifests[0] == manifests[1].replace('"prompt": null', '"prompt": null')


def test_parameters_are_read_once(zoo) -> None:
    with Session(zoo("qwen2")) as session:
        before = session.checkpoint.bytes_read
        session.forward(TOKENS)
        assert session.checkpoint.bytes_read - before == len(set(TOKENS)) * 72 * 4  # rows of the embedding


def test_it_says_what_it_is_and_frees_its_memory() -> None:
    before = alive()
    session = jaxref.Session(open_checkpoint(EMBEDDED))
    where = f"qwen2, 4 layers, float32 on {session.device}"
    assert repr(session) == f"<Session embedded: {where}, 0.765 MB of parameters>"
    assert alive() - before == 765472
    with session:
        pass
    assert alive() == before
    assert "closed" in repr(session)
    with pytest.raises(UserError, match="the session is closed"):
        session.forward([1])


@pytest.mark.parametrize("tokens", [np.array([1.5]), np.array([[1, 2]])], ids=["fractions", "two axes"])
def test_tokens_are_whole_numbers(tokens) -> None:
    with Session("tiny") as session, pytest.raises(UserError, match="whole numbers were expected"):
        session.forward(tokens)


def alive() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_what_does_not_fit_is_told_before_anything_is_read() -> None:
    checkpoint = open_checkpoint(EMBEDDED)
    with pytest.raises(UserError, match=r"0.765 MB of parameters\), 0.5 MB may be used"):
        Session(checkpoint, max_memory=500_000)
    assert checkpoint.bytes_read == 0
    with Session(checkpoint, max_memory=1_200_000) as session:
        session.forward([1, 2, 3])
        with pytest.raises(UserError, match=r"with 60 tokens needs .* may be used: take fewer tokens"):
            session.forward(prompt(60, 272))


@pytest.mark.parametrize(
    ("options", "tokens", "says"),
    [
        ({"dtype": "int8"}, [1], "dtype 'int8' is not known"),
        ({"device": "cuda"}, [1], "--device cuda: JAX finds none"),
        ({"mesh": "tp=1000"}, [1], "needs 1000 devices"),
        ({"mesh": "pp=2"}, [1], "no axis 'pp'"),
        ({}, [], "at least one token"),
        ({}, [272], r"\[272\] are outside the vocabulary"),
        ({}, np.array([-1]), "outside the vocabulary"),
    ],
)
def test_wrong_use(options: dict, tokens, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Session("tiny", **options).forward(tokens)


class Slow:
    """An array on a device to which nothing has been transferred yet: that happens when somebody waits for it."""

    def __init__(self, source: np.ndarray, device) -> None:
        self.address, self.like, self.arrived = source.ctypes.data, np.empty_like(source), None

    def block_until_ready(self) -> Slow:
        ctypes.memmove(self.like.ctypes.data, self.address, self.like.nbytes)
        self.arrived = self.like
        return self


def test_nothing_is_written_over_before_it_has_arrived(zoo, monkeypatch) -> None:
    """The stand-in does not refer to what it is given, as a transfer under way would not have to."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it is no `jax.Array`
    checkpoint = open_checkpoint(zoo("qwen2"))
    monkeypatch.setattr(reading.jax, "device_put", Slow)
    with Reader(checkpoint, numerics_of("float32"), None) as reader:
        layers = list(reader.layers(4))
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(layer.up_proj.arrived, checkpoint.layer(index).up_proj)
        np.testing.assert_array_equal(layer.k_proj.arrived, checkpoint.layer(index).k_proj)


def test_a_program_that_is_not_installed_dumps_too(tmp_path, monkeypatch) -> None:
    found = metadata.version

    def version(name: str) -> str:
        if name == "jaxref":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    write_tree(EMBEDDED, tmp_path, [1, 2], stages="attn_norm")
    versions = json.loads((tmp_path / "manifest.json").read_text())["versions"]
    assert versions["jaxref"] == "not installed" and versions["jax"] == found("jax")


def test_values_start_home_as_soon_as_they_exist(zoo, tmp_path, monkeypatch) -> None:
    """On a device that is no CPU, only what is wanted, each before the stage after it is computed."""
    sent = []
    monkeypatch.setattr(dumping, "_send_home", lambda piece: sent.append(piece.stage))
    card = SimpleNamespace(platform="gpu", device_kind="a card", memory_stats=lambda: None)
    monkeypatch.setattr(dumping.jax, "devices", lambda: [card])
    monkeypatch.setattr(dumping.jax, "default_device", lambda device: nullcontext())
    monkeypatch.setattr(dumping, "stream", lambda c, t, s, n, place, **options: stream(c, t, s, n, None, **options))
    write_tree(zoo("qwen3"), tmp_path, TOKENS, stages="attn_norm,lm_head", layers="0..2")
    assert sent == ["attn_norm", "attn_norm", "lm_head"]
