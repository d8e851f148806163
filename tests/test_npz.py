"""`.npz` files: read where their arrays lie, and refused where that is not sure."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxref.npz import open_npz
from weights import UserError

NAMES = ["layer-0/attn_norm", "lm_head"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.float16)]
    np.savez(tmp_path / "t.npz", **dict(zip(NAMES, arrays, strict=True)))
    return tmp_path / "t.npz"


def zipped(path: Path, *members: tuple[str, bytes], **options: int) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of two members of one name
        for name, data in members:
            archive.writestr(name, data)
    return path


def saved(tmp_path: Path, array: np.ndarray) -> bytes:
    np.save(tmp_path / "a.npy", array)
    return (tmp_path / "a.npy").read_bytes()


def test_arrays_are_found_by_their_names(path: Path) -> None:
    found = open_npz(path)
    assert list(found) == NAMES
    with np.load(path) as theirs:
        for name, values in found.items():
            assert (values.dtype, values.shape) == (theirs[name].dtype, theirs[name].shape)
            np.testing.assert_array_equal(values, theirs[name])
            np.testing.assert_array_equal(values.map(), theirs[name])
    np.testing.assert_array_equal(found[NAMES[0]][1, 1:], [4, 5])


def test_the_large_files_of_numpy_and_of_others(tmp_path: Path) -> None:
    """With sizes of 64 bits, with what follows a member, in folders, and without the suffix in the name."""
    array = np.arange(4, dtype=np.float32)
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.mkdir("layer-0")
        with archive.open("layer-0/attn_norm.npy", "w", force_zip64=True) as member:
            member.write(saved(tmp_path, array))
        archive.writestr("lm_head", saved(tmp_path, array + 1))
    found = open_npz(tmp_path / "t.npz")
    assert list(found) == NAMES
    np.testing.assert_array_equal(found["lm_head"], array + 1)


def test_what_is_not_wanted_may_be_anything(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=np.ones(3), mask=np.ones(2, bool), more=np.array([{}], object))
    assert open_npz(tmp_path / "t.npz", wanted="a".__eq__)["a"].shape == (3,)
    for name in ("mask", "more"):
        with pytest.raises(UserError, match=rf"t\.npz/{name}\.npy: "):
            open_npz(tmp_path / "t.npz", wanted=name.__eq__)


def test_what_is_refused(tmp_path: Path, path: Path) -> None:
    whole, half = saved(tmp_path, np.ones(2)), saved(tmp_path, np.ones(2, ml_dtypes.bfloat16))
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros(100))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:-1])
    moved = tmp_path / "moved.npz"
    moved.write_bytes(path.read_bytes().replace(b"lm_head.npy", b"lm_tail.npy", 1))  # in its own head alone
    (tmp_path / "none.npz").write_bytes(b"PK")
    for file, words in (
        (tmp_path / "c.npz", r"'a\.npy' is not stored as it is; save it with numpy\.savez"),
        (zipped(tmp_path / "two.npz", ("a.npy", whole), ("a", whole)), "two arrays in it are called 'a'"),
        (zipped(tmp_path / "same.npz", ("a.npy", whole), ("a.npy", whole)), "two arrays in it are called 'a'"),
        (zipped(tmp_path / "bf.npz", ("a.npy", half)), "no little-endian floats or integers; save it as float32"),
        (
            zipped(tmp_path / "long.npz", ("a.npy", whole + b"x")),
            r"a\.npy: 145 bytes, but its header says \[2\]",
        ),
        (cut, r"not a whole \.npz file: File is not a zip file"),
        (moved, r"not a whole \.npz file: 'lm_head\.npy' is not where it is said to be"),
        (tmp_path / "none.npz", r"not a whole \.npz file"),
        (tmp_path / "nothing.npz", "No such file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=words):
            open_npz(file)


def test_one_that_changes_is_refused(path: Path) -> None:
    found = open_npz(path)
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match="changed while it was in use"):
        np.asarray(found["lm_head"])
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match="changed while it was in use"):
        np.asarray(found["lm_head"])


def test_a_map_of_numbers_that_begin_anywhere(tmp_path: Path) -> None:
    """Numbers in a zip begin at no multiple of their size, and JAX takes them all the same."""
    import jax.numpy as jnp

    array = np.linspace(0, 1, 7, dtype=np.float32)
    for name in ("a", "ab", "abc", "abcd"):
        np.savez(tmp_path / "t.npz", **{name: array})
        mapped = open_npz(tmp_path / "t.npz")[name].map()
        np.testing.assert_array_equal(jnp.asarray(mapped), array)
