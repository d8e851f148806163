"""Numbers read from a file into another dtype: NumPy's own conversion, every Inf and NaN seen, a short file refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from weights.upcast import CHUNK, all_finite, read_into

DTYPES = [np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)]
both = pytest.mark.parametrize(("stored", "wanted"), list(itertools.product(DTYPES, DTYPES)), ids=str)
OFFSET = 10  # not on the address of any number


DRAWN = np.random.default_rng(0).standard_normal(CHUNK + 77)


def values(dtype: np.dtype) -> np.ndarray:
    """More than a chunk of any sign, with zeros and the smallest numbers."""
    found = DRAWN.astype(dtype)
    found[:4] = np.array([0.0, -0.0, 1e-7, -1e-7]).astype(dtype)
    return found


def read(path: Path, x: np.ndarray, wanted: np.dtype) -> tuple[bool, np.ndarray]:
    path.write_bytes(b"x" * OFFSET + x.tobytes())
    out = np.empty(x.shape, wanted)
    with path.open("rb") as file:
        return read_into(file.fileno(), OFFSET, x.dtype, out), out


@both
def test_it_is_numpys_conversion(tmp_path: Path, stored: np.dtype, wanted: np.dtype) -> None:
    x = values(stored)
    finite, out = read(tmp_path / "x", x, wanted)
    assert finite
    assert out.tobytes() == x.astype(wanted).tobytes()


@both
@pytest.mark.parametrize("wrong", ["inf", "-inf", "nan", "-nan"])
def test_what_is_not_finite_is_seen_wherever_it_stands(
    tmp_path: Path, stored: np.dtype, wanted: np.dtype, wrong: str
) -> None:
    for place in (0, CHUNK - 1, CHUNK):
        x = values(stored)
        x[place] = np.copysign(float(wrong.strip("-")), -1.0 if wrong[0] == "-" else 1.0)
        finite, out = read(tmp_path / "x", x, wanted)
        assert not finite
        assert not np.isfinite(out[place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_greatest_numbers_are_finite(dtype: np.dtype) -> None:
    most = ml_dtypes.finfo(dtype).max
    assert all_finite(np.array([most, -most], dtype))
    assert all_finite(np.array([], dtype))


def test_an_overflow_is_seen(tmp_path: Path) -> None:
    x = values(np.dtype(np.float32))
    x[5] = -1e5
    assert read(tmp_path / "x", x, np.dtype(ml_dtypes.bfloat16))[0]
    assert not read(tmp_path / "x", x, np.dtype(np.float16))[0]


def test_a_file_that_is_too_short(tmp_path: Path) -> None:
    x = values(np.dtype(np.float16))
    path = tmp_path / "x"
    path.write_bytes(x.tobytes())
    with path.open("rb") as file, pytest.raises(EOFError, match=str(x.nbytes)):
        read_into(file.fileno(), OFFSET, x.dtype, np.empty(x.shape, np.float32))
