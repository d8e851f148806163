"""Numbers read out of a file where they are asked for: those that NumPy gives, and a line where there are none."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import weights.extent
from weights import UserError
from weights.extent import Extent
from weights.watched import Version, Watched

DTYPES = [np.dtype(kind) for kind in (np.float32, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8)]
SHAPE = (3, 7, 5)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Extent, np.ndarray]:
    """The same numbers in a file, which has something before and after them, and in memory."""
    values = np.arange(np.prod(SHAPE)).astype(request.param).reshape(SHAPE)
    path = tmp_path_factory.mktemp("extent") / "x"
    path.write_bytes(b"12 bytes: ..." + values.tobytes() + b"more")
    return Extent(Watched(path), 13, request.param, SHAPE), values


def indices(length: int) -> st.SearchStrategy:
    """A slice or a list of indices of an axis."""
    ends = st.one_of(st.none(), st.integers(-length - 2, length + 2))
    steps = st.sampled_from([None, 1, 2, -1])
    return st.one_of(st.builds(slice, ends, ends, steps), st.lists(st.integers(0, length - 1), max_size=2 * length))


@given(data=st.data())
def test_an_index_gives_what_numpy_gives(both: tuple[Extent, np.ndarray], data: st.DataObject) -> None:
    extent, values = both
    shape = data.draw(st.sampled_from([SHAPE, (105,), (1, 105), (21, 5)]))
    extent, values = extent.reshape(*shape), values.reshape(shape)
    depth = data.draw(st.integers(0, len(shape) - 1))
    index: list = [data.draw(st.integers(-size, size - 1)) for size in shape[:depth]]
    last = data.draw(st.one_of(indices(shape[depth]), st.integers(-shape[depth], shape[depth] - 1)))
    whole = (*index, np.array(last, np.int64) if isinstance(last, list) else last)
    found = extent[(*index, last)]
    assert (found.dtype, found.shape) == (values.dtype, values[whole].shape)
    assert found.tobytes() == values[whole].tobytes()


def test_it_is_an_array(both: tuple[Extent, np.ndarray]) -> None:
    extent, values = both
    assert np.array_equal(np.asarray(extent), values)
    assert np.asarray(extent, np.float64).dtype == np.float64
    assert np.array_equal(np.stack(list(extent)), values)
    assert np.array_equal(extent.map(), values) and not extent.map().flags.writeable
    assert float(extent[1, 2, 3]) == float(values[1, 2, 3])


@pytest.mark.parametrize("index", [3, -4, (0, 7), [0, 3], [-1], (0, 0, 5)])
def test_what_is_not_there_is_no_number(both: tuple[Extent, np.ndarray], index) -> None:
    with pytest.raises(IndexError):
        both[0][index]
    with pytest.raises(ValueError, match="no shape"):
        both[0].reshape(3, 7)


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(8))
    extent = Extent(Watched(path), 0, np.dtype(np.float32), (2,))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"^{path}: changed while it was in use"):
        extent[:]
    with pytest.raises(UserError, match="is a pipe or a device"):
        Watched(path)


def test_what_was_written_while_it_was_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(8))
    os.utime(path, (1, 1))
    extent = Extent(Watched(path), 0, np.dtype(np.float32), (2,))
    monkeypatch.setattr(weights.extent, "fill", lambda *_: path.write_bytes(b"12345678"))
    with pytest.raises(UserError, match=f"^{path}: changed while it was in use; run again"):
        extent[:]


def test_a_file_without_the_numbers(tmp_path: Path) -> None:
    """Of the same version, but shorter than its reader believed."""
    path = tmp_path / "x"
    path.write_bytes(bytes(8))
    for offset, count in ((0, 3), (8, 1), (100, 1)):
        extent = Extent(Watched(path), offset, np.dtype(np.float32), (count,))
        with pytest.raises(UserError, match="ends before"):
            extent[:]
        with pytest.raises(UserError, match="not readable"):
            extent.map()


def test_another_folder_and_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    file = Watched(Path("x"))
    monkeypatch.chdir("/")
    assert Extent(file, 0, np.dtype(np.float32), (2,))[:].tolist() == [0, 0]
    older = Watched(tmp_path / "x", Version(*file.version[:3], time=1))
    with pytest.raises(UserError, match="changed while it was in use; run again"):
        older.check()
