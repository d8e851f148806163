"""What is drawn against the plain NumPy of it, and a head of a real vocabulary in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxref.stages import STAGES
from oracle.layouts import Pair, View
from oracle.page.differences import BINS, COLUMNS, ROWS, differences
from oracle.plots import difference_map, svg_of
from oracle.tensor_file import TensorFile

DIMS = {"S": 6, "D": 40, "H": 4, "K": 2, "h": 8, "F": 64, "V": 151_936}


def pair_of(stage: str, ours: np.ndarray, theirs: np.ndarray, positions: tuple[int, ...] | None = None) -> Pair:
    """Two arrays as [outer, rows, columns] of a stage."""
    positions = positions or tuple(range(ours.shape[1]))
    views = [View(TensorFile(Path("x"), x.reshape(-1)), x, positions) for x in (ours, theirs)]
    return Pair(STAGES[stage], DIMS, *views, positions)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_a_small_one_is_drawn_value_by_value() -> None:
    ours, theirs = random(1, 6, 40), random(1, 6, 40, seed=1)
    theirs[0, 2, 5] = ours[0, 2, 5]
    found = differences(pair_of("attn_norm", ours, theirs, (3, 4, 5, 6, 7, 9)))
    rms = np.sqrt(np.square(ours.astype(float)).mean())
    np.testing.assert_allclose(found.cells, np.abs(theirs[0] - ours[0].astype(float)) / rms, rtol=1e-12)
    assert found.row_labels == [3, 4, 5, 6, 7, 9] and found.row_name == "token" and found.heads == []
    assert (found.equal, found.count) == (1, 240)
    assert found.errors.sum() == 239 and found.values.sum(axis=1).tolist() == [240, 240]
    assert found.reach == pytest.approx(max(np.abs(ours).max(), np.abs(theirs).max()) / rms)


def test_one_wrong_value_is_seen_however_large_the_tensor() -> None:
    ours = random(1, 500, 3000)
    theirs = ours.copy()
    theirs[0, 321, 2345] += 1
    found = differences(pair_of("ffn_up", ours, theirs))
    assert found.cells.shape == (ROWS, COLUMNS)
    ((row, column),) = np.argwhere(found.cells)
    assert found.row_labels[row] <= 321 < found.row_labels[row + 1]
    assert column * 3000 // COLUMNS <= 2345 < (column + 1) * 3000 // COLUMNS


def test_attention_is_head_by_key_and_only_what_a_query_may_see() -> None:
    ours = random(4, 6, 6)
    theirs = ours.copy()
    theirs[2, 5, 1] += 1  # head 2, key 1
    theirs[3, 1, 4] += 99  # a key after the query: not comparable
    found = differences(pair_of("attn_scores", ours, theirs))
    assert (found.row_name, found.column_name, found.cells.shape) == ("head", "key", (4, 6))
    assert np.argwhere(found.cells).tolist() == [[2, 1]]
    assert found.count == 4 * 21


def test_what_is_not_finite_is_set_apart() -> None:
    ours, theirs = random(1, 6, 40), random(1, 6, 40)
    theirs[0, 1, 2], theirs[0, 3, 4] = np.nan, np.inf
    found = differences(pair_of("attn_norm", ours, theirs))
    assert np.argwhere(np.isnan(found.cells)).tolist() == [[1, 2], [3, 4]]
    assert found.count == 238 and found.errors.sum() == 0
    assert "<image" in svg_of(difference_map(found, 1.0), "x")


def test_heads_have_names() -> None:
    names = differences(pair_of("qkv_matmul", random(1, 6, 64), random(1, 6, 64, seed=1))).heads
    assert names == ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    assert differences(pair_of("k_post_rope", random(1, 6, 16), random(1, 6, 16, seed=1))).heads == ["0", "1"]


def test_equal_tensors_and_zeros() -> None:
    zeros = np.zeros((1, 6, 40), np.float32)
    found = differences(pair_of("attn_norm", zeros, zeros))
    assert not found.cells.any() and found.equal == 240 and found.errors.shape == (BINS,)


def test_a_head_of_a_real_vocabulary_takes_little_memory() -> None:
    ours = np.ones((1, 64, DIMS["V"]), np.float32)
    theirs = ours.copy()
    theirs[0, 50, 151_000] = 2
    tracemalloc.start()
    found = differences(pair_of("lm_head", ours, theirs))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32_000_000 < ours.nbytes  # of 39 MB a side
    assert len(svg_of(difference_map(found, 1.0), "x")) < 200_000
    assert np.argwhere(found.cells).tolist() == [[50, 151_000 * COLUMNS // DIMS["V"]]]
