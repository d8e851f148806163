"""Capture changes nothing: whatever is asked for, a stage's file has the same bytes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jaxref import model
from jaxref.precision import numerics_of
from jaxref.reader import Buffers, Reader
from jaxref.selection import Selection
from jaxref.stages import STAGES
from jaxref.stream import stream
from tests.conftest import prompt
from tests.trees import read_tree, tree_bytes, write_tree
from weights import Layer, open_checkpoint

TOKENS = prompt(40, 272)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "moe"])
def full(request: pytest.FixtureRequest, zoo, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    folder, output = zoo(request.param), tmp_path_factory.mktemp("full") / "tree"
    write_tree(folder, output, TOKENS)
    return folder, tree_bytes(output)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_subset_has_the_same_bytes(full, tmp_path, data: st.DataObject) -> None:
    folder, whole = full
    config = open_checkpoint(folder).config
    present = list(dict.fromkeys(Path(path).stem for path in whole))
    stages = data.draw(st.sets(st.sampled_from(present), min_size=1))
    layers = data.draw(st.sets(st.integers(0, config.num_hidden_layers - 1), min_size=1))
    wanted = {
        path
        for path in whole
        if Path(path).stem in stages and ("/" not in path or int(path.split("/")[0][6:]) in layers)
    }
    if not wanted:  # only the embedding, without layer 0
        return
    output = tmp_path / "subset"
    shutil.rmtree(output, ignore_errors=True)
    write_tree(folder, output, TOKENS, stages=",".join(stages), layers=",".join(map(str, layers)))
    assert tree_bytes(output) == {path: whole[path] for path in wanted}


def test_positions_are_rows_of_the_full_dump(full, tmp_path) -> None:
    folder, _ = full
    write_tree(folder, tmp_path / "rows", TOKENS, positions="5,39")
    write_tree(folder, tmp_path / "all", TOKENS, positions="all")
    config = open_checkpoint(folder).config
    everything = read_tree(tmp_path / "all")
    for path, values in read_tree(tmp_path / "rows").items():
        stage = STAGES[Path(path).stem]
        complete = everything[path].reshape(stage.shape(config, 40))
        rows = np.take(complete, [5, 39], axis=stage.row_axis)
        assert rows.size == values.size
        np.testing.assert_allclose(values, rows.ravel(), rtol=1e-5, atol=1e-5, err_msg=path)
        if stage.name != "lm_head":  # whose matmul has another number of rows
            assert values.tobytes() == rows.tobytes(), path


@pytest.mark.parametrize("positions", [None, "3,11,39"])
def test_blocks_of_query_rows_are_written_where_they_belong(zoo, tmp_path, monkeypatch, positions) -> None:
    """The files that come in blocks hold what `forward` returns whole, with digests of what is on disk."""
    monkeypatch.setattr(model, "SCORES_IN_BLOCK", 6 * 40 * 7)
    folder = zoo("qwen2")
    report = write_tree(folder, tmp_path / "tree", TOKENS, stages="attn_scores,attn_softmax", positions=positions)
    checkpoint = open_checkpoint(folder)
    trace = model.forward(checkpoint.params(), np.asarray(TOKENS), checkpoint.config)
    rows = list(range(40)) if positions is None else [3, 11, 39]
    import hashlib

    for entry in report.files:
        expected = np.asarray(trace[f"layer-{entry['layer']}"][entry["stage"]])[:, rows]
        path = tmp_path / "tree" / entry["path"]
        assert path.read_bytes()[12:] == expected.tobytes()
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert entry["max"] == expected.max()
        assert entry["rms"] == pytest.approx(np.sqrt(np.mean(np.square(expected, dtype=np.float64))), rel=1e-12)


@pytest.mark.parametrize("block", [1 << 24, 6 * 40 * 7])
def test_the_apr_convention_has_zeros_above_the_diagonal(zoo, tmp_path, monkeypatch, block: int) -> None:
    """And differs in nothing else."""
    monkeypatch.setattr(model, "SCORES_IN_BLOCK", block)
    write_tree(zoo("qwen2"), tmp_path / "apr", TOKENS, convention="apr")
    write_tree(zoo("qwen2"), tmp_path / "canonical", TOKENS)
    apr, canonical = read_tree(tmp_path / "apr"), read_tree(tmp_path / "canonical")
    for path, values in canonical.items():
        expected = np.tril(values.reshape(6, 40, 40)).ravel() if path.endswith("attn_scores.bin") else values
        np.testing.assert_array_equal(apr[path], expected)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "float32"])
def test_safetensors_keep_the_dtype(zoo, tmp_path, dtype: str) -> None:
    folder = zoo("qwen3")
    write_tree(folder, tmp_path / "tree", TOKENS, dtype=dtype, form="safetensors", positions="all")
    checkpoint = open_checkpoint(folder)
    trace = model.forward(checkpoint.params(), np.asarray(TOKENS), checkpoint.config, dtype)
    for path in (tmp_path / "tree").rglob("*.safetensors"):
        ((name, values),) = load_file(path).items()
        expected = trace[name] if path.parent.name == "tree" else trace[path.parent.name][name]
        assert values.dtype == expected.dtype
        assert values.tobytes() == np.asarray(expected).tobytes(), path


def test_the_memory_of_parameters_is_used_again() -> None:
    """Else the peak would grow with the number of layers."""
    buffers = Buffers()
    shapes = [(300, 7), (5,), (300, 7)]
    for _ in range(20):
        arrays = [jax.device_put(buffers.take(shape, np.dtype(np.float32))) for shape in shapes]
        assert len({array.unsafe_buffer_pointer() for array in arrays}) == 3
        jax.block_until_ready(arrays)
        del arrays
    assert len(buffers) <= 2 * len(shapes)


def test_a_stream_that_is_given_up_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may close it within any thread; waiting there for the reader has been a deadlock."""
    checkpoint, go = open_checkpoint("tiny"), threading.Event()
    read = Reader.layer

    def slow(self: Reader, index: int) -> Layer:
        assert index == 0 or go.wait(60)
        return read(self, index)

    monkeypatch.setattr(Reader, "layer", slow)
    selection = Selection(checkpoint.config, 3, ("attn_norm",), (0, 1))
    pieces = stream(checkpoint, [1, 2, 3], selection, numerics_of("float32"))
    next(pieces), next(pieces)
    closer = threading.Thread(target=pieces.close, daemon=True)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    go.set()
