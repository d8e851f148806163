"""What tells one file of weights from another: its size, its header, and a sample of its bytes or all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weights.watched import Watched

BLOCK, BLOCKS = 4096, 64  # bytes of a block of the sample, and how many lie between the first and the last
DIGESTS = ("sample_sha256", "sha256")  # those that a manifest need not have: of an older version, or on demand


def sample_places(size: int) -> list[int]:
    """Where the blocks of a sample begin in a file of `size` bytes: at multiples of `BLOCK`, and the last at the end.

    They cover all of a file of up to 264 KiB.
    """
    last = max(0, size - BLOCK)
    spread = (last * index // (BLOCKS + 1) for index in range(BLOCKS + 1))
    return sorted({last, *(place // BLOCK * BLOCK for place in spread)})


def sample_sha256(file: Watched) -> str:
    """The SHA-256 of 66 blocks of 4 KiB, one after another, that lie evenly in the file: the first, 64, the last.

    Two models of one shape whose tensors all differ have different samples. What lies between the blocks is not seen:
    a single other tensor, or a few rows of one, may give the same sample in a file of gigabytes; only the hash of the
    whole file tells them apart. Raises `UserError` where the file is no longer the one that was opened.
    """
    digest = hashlib.sha256()
    with file.opened() as opened:
        if hasattr(os, "posix_fadvise"):  # else the system reads 128 KB ahead of each block
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_RANDOM)
        for place in sample_places(file.version.size):
            digest.update(os.pread(opened, BLOCK, place))
    return digest.hexdigest()


def whole_sha256(file: Watched) -> str:
    """The SHA-256 of all bytes. Raises `UserError` where the file is no longer the one that was opened."""
    with file.opened() as opened, open(opened, "rb", closefd=False) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def same_weights(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two manifests tell of the same files, by all that both say of their bytes."""
    return len(ours) == len(theirs) and all(
        _beside(one, other) == _beside(other, one) for one, other in zip(ours, theirs, strict=True)
    )


def _beside(file: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key not in DIGESTS or key in other}


def differing(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The files that should be the same in two manifests, by their name or by their header, and have other bytes.

    Samples count between files of one header: other headers may hold the same model (in another dtype).
    """
    found = [
        str(one.get("file"))
        for key, digests in (("file", ("sha256",)), ("header_sha256", DIGESTS))
        for one, other in _pairs(ours, theirs, key)
        if any(None not in (one.get(d), other.get(d)) and one[d] != other[d] for d in digests)
    ]
    return sorted(set(found))


def _pairs(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], key: str
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Files of both that agree in a key that is a text."""
    known = {file[key]: file for file in theirs if isinstance(file.get(key), str)}
    for file in ours:
        if isinstance(file.get(key), str) and file[key] in known:
            yield file, known[file[key]]
