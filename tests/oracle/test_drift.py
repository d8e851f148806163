"""A scale that all rows share is told from the roundings of an engine that rounds a norm once and not twice."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.deviations import shared

WIDTH = 448


def _norms(seed: int, rows: int, outlier: bool, eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """One norm in float16, rounded once with this eps, and rounded twice with 1e-6."""
    chance = np.random.default_rng(seed)
    x, weight = chance.normal(0, 0.3, (rows, WIDTH)), chance.uniform(0.5, 1.5, WIDTH).astype(np.float16)
    if outlier:
        weight[3] = 60.0  # real checkpoints have such channels
    size = np.square(x).mean(axis=1, keepdims=True)
    once = (x / np.sqrt(size + eps) * weight.astype(np.float64)).astype(np.float16)
    twice = ((x / np.sqrt(size + 1e-6)).astype(np.float16) * weight).astype(np.float16)
    return once.astype(np.float64), twice.astype(np.float64)


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("rows", [2, 7, 23, 60])
def test_roundings_share_no_scale(rows: int, outlier: bool) -> None:
    assert not any(shared(*_norms(seed, rows, outlier)) for seed in range(100))


@pytest.mark.parametrize("rows", [23, 60])
def test_another_eps_is_a_scale_that_rows_share(rows: int) -> None:
    """A row is smaller by eps over twice its mean square: 1.1 % here."""
    found = [shared(*_norms(seed, rows, False, eps=2e-3)) for seed in range(100)]
    assert np.allclose(found, -2e-3 / (2 * 0.09), rtol=0.1)


def test_one_row_tells_nothing() -> None:
    assert shared(*_norms(0, 1, False, eps=2e-3)) == 0.0
