"""Figures against NumPy and SciPy one-liners over the whole tensor; blocks must not matter."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle.metrics import Figures, Logits, Sums

rng = np.random.default_rng(0)


def measured(reference: np.ndarray, test: np.ndarray, dtype: str = "float32", rows: int = 3) -> Figures:
    sums = Sums(dtype, reference.size, reference.shape[1], rows * reference.shape[1])
    for row in range(0, len(reference), rows):
        sums.add(reference[row : row + rows], test[row : row + rows], (0, row))
    return sums.figures()


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_figures_are_those_of_numpy(rows: int) -> None:
    r = rng.standard_normal((40, 17)).astype(np.float32)
    t = (r + 1e-3 * rng.standard_normal(r.shape)).astype(np.float32)
    found = measured(r, t, rows=rows)
    r, t = r.astype(np.float64), t.astype(np.float64)
    d = t - r
    assert found.count == r.size
    assert found.relative_l2 == pytest.approx(np.linalg.norm(d) / np.linalg.norm(r), rel=1e-12)
    assert found.cosine == pytest.approx((r.ravel() @ t.ravel()) / np.linalg.norm(r) / np.linalg.norm(t), rel=1e-12)
    assert found.max_abs == np.abs(d).max()
    assert found.place == (0, *np.unravel_index(np.abs(d).argmax(), d.shape))
    assert found.rms == pytest.approx(np.sqrt(np.mean(d**2)), rel=1e-12)
    assert found.snr_db == pytest.approx(10 * np.log10((r**2).sum() / (d**2).sum()), rel=1e-12)
    channels = np.linalg.norm(d, axis=0) / np.linalg.norm(r, axis=0)
    assert found.channel_median == pytest.approx(np.median(channels), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_ulps_are_those_of_numpy_spacing(dtype: type) -> None:
    # Away from where a value and its rounding lie on two sides of a power of two.
    r = (rng.uniform(1.01, 1.98, (50, 9)) * 2.0 ** rng.integers(-12, 12, (50, 9))).astype(np.float64)
    t = (r * (1 + 1e-2 * rng.standard_normal(r.shape))).astype(dtype).astype(np.float64)
    found = measured(r, t, np.dtype(dtype).name)
    spacing = np.spacing(np.asarray(r, np.float32).astype(dtype)).astype(np.float64)
    ulps = np.abs(t - r) / spacing
    assert found.ulp_max == pytest.approx(ulps.max(), rel=1e-6)
    assert found.ulp_median == pytest.approx(np.median(ulps), rel=1e-6)


def test_rounding_once_is_half_an_ulp() -> None:
    r = rng.standard_normal((100, 100))
    assert 0.2 < measured(r, r.astype(np.float16), "float16").ulp_median < 0.3
    assert measured(r, r.astype(np.float16), "float16").ulp_max <= 0.5


def test_massive_activations_do_not_hide_an_error() -> None:
    r = rng.standard_normal((7, 896)) * 0.27
    r[0, 5] = 1112
    t = r * 1.1
    t[0, 5] = 1112
    found = measured(r, t)
    assert found.cosine > 0.9999 and found.relative_l2 < 0.01
    assert found.channel_median == pytest.approx(0.1, rel=1e-6)


def test_hidden_values_do_not_count() -> None:
    r = rng.standard_normal((6, 6))
    t, visible = r + 1e-3, np.tri(6, dtype=bool)
    sums = Sums("float32", r.size, 1, r.size)
    sums.add(np.where(visible, r, np.nan), np.where(visible, t, -7e5), channel=0, visible=visible)
    found = sums.figures()
    assert (found.count, found.mismatched) == (21, 0)
    assert found.max_abs == pytest.approx(1e-3) and found.rms == pytest.approx(1e-3)
    exponents = np.floor(np.log2(np.abs(r[visible])))
    assert found.ulp_median == pytest.approx(np.median(1e-3 / 2.0 ** (exponents - 23)), rel=1e-6)


def test_nan_and_infinity() -> None:
    r = rng.standard_normal((5, 4))
    t = r.copy()
    t[2, 1], t[3, 3] = np.nan, np.inf
    r[4, 0], t[4, 0] = np.inf, np.inf  # the same in both: no mismatch
    found = measured(r, t, rows=2)
    assert (found.mismatched, found.mismatch) == (2, (0, 2, 1))
    assert (found.bad_reference, found.bad_test, found.count) == (1, 3, 17)
    assert found.max_abs == 0 and not found.equal
    assert measured(np.full((2, 2), np.nan), np.full((2, 2), np.nan)).count == 0


def test_nothing_is_divided_by_zero() -> None:
    zeros, ones = np.zeros((3, 3)), np.ones((3, 3))
    assert measured(zeros, zeros).relative_l2 == 0 and measured(zeros, zeros).equal
    found = measured(zeros, ones)
    assert (found.relative_l2, found.cosine, found.channel_median) == (np.inf, 0.0, np.inf)
    assert found.to_json()["relative_l2"] is None


def test_kl_and_agreement_against_scipy() -> None:
    special = pytest.importorskip("scipy.special")
    r, t = rng.standard_normal((2, 4, 50)) * 3
    logits = Logits()
    logits.add(r, t)
    p, q = special.log_softmax(r, axis=1), special.log_softmax(t, axis=1)
    found = logits.figures()
    assert found["kl"] == pytest.approx(special.rel_entr(np.exp(p), np.exp(q)).sum(axis=1).mean(), rel=1e-9)
    assert found["top1"] == (r.argmax(axis=1) == t.argmax(axis=1)).mean()
    tops = [len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in zip(r, t, strict=True)]
    assert found["top10"] == pytest.approx(np.mean(tops))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 40), st.sampled_from(["float16", "float32"]))
def test_blocks_do_not_matter(rows: int, columns: int, block: int, dtype: str) -> None:
    local = np.random.default_rng(rows * 100 + columns)
    r, t = local.standard_normal((2, rows, columns)).astype(np.float32)
    whole, parts = measured(r, t, dtype, rows), measured(r, t, dtype, block)
    for name, value in whole.to_json().items():
        assert getattr(parts, name) == (pytest.approx(value, rel=1e-9) if value is not None else value), name
