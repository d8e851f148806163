"""GGUF's quantised blocks unpacked by loops like those of ggml-quants.c, number by number of a block, with faults."""

from __future__ import annotations

import numpy as np

from tests.oracle.standin.unpack_large import LARGE
from tests.oracle.standin.unpack_parts import E2M1, IQ4, Halves, Numbers, nibbles, signed

SIZES = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q5_0": (32, 22), "Q2_K": (256, 84), "Q3_K": (256, 110)}
SIZES |= {"Q4_1": (32, 20), "Q5_1": (32, 24), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17)}
SIZES |= {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
# Faults that any of the types may have: they are in the reading of float16 or in which block's scale is taken.
SCALES = ("d flushed", "d as normal", "d of the first")
FAULTS: dict[str, tuple[str, ...]] = {
    "Q8_0": ("unsigned", "d as bfloat16", "less 128", *SCALES),
    "Q4_0": ("offset missing", "signed", "bits exchanged"),
    "Q5_0": (
        *("offset missing", "signed", "bits exchanged", "runs of 1", "high bits missing", "as Q4_0", "high bits turns"),
        *("high bits exchanged", "high bits from the top", "high bits big-endian", "high bits bytes from the top"),
    ),
    "Q4_1": ("runs of 1", "bits exchanged", "mins missing", "mins subtracted", "d and m", "d flushed"),
    "Q5_1": ("high bits missing", "high bits turns", "mins missing", "runs of 1", "high bits exchanged", "d and m"),
    "IQ4_NL": ("runs of 1", "bits exchanged", "linear", "d as normal", "d of the first"),
    "IQ4_XS": (
        "runs of 1",
        "runs of 32",
        "bits exchanged",
        "linear",
        "scale bits missing",
        "scale offset",
        "d flushed",
    ),
    "MXFP4": ("runs of 1", "bits exchanged"),
    "Q2_K": ("runs of 1", "bits exchanged", "scales and mins", "mins missing", "mins added", "d and dmin"),
    "Q3_K": (
        *("offset missing", "high bits missing", "high bits inverted", "high bits set", "high bits from the top"),
        *("high bits unshifted", "scale offset", "scale bits missing", "runs of 1", "d flushed"),
    ),
    "Q4_K": (
        *("runs of 1", "runs of 16", "runs of 64", "runs of 128", "bits exchanged", "mins missing", "mins added"),
        *("d and dmin", "scales and mins", "scale bits missing", "scale bits unmasked", "scales in a row", *SCALES),
    ),
    "Q5_K": (
        *("runs of 16", "bits exchanged", "high bits missing", "high bits halves", "high bits exchanged"),
        *("high bits from the top", "high bits unshifted", "mins missing", "scale bits missing", "scale bits unmasked"),
    ),
    "Q6_K": (
        *("runs of 32", "runs of 1", "bits exchanged", "offset missing", "signed", "high bits missing"),
        *("high bits exchanged", "high bits from the top", "high bits unshifted", "scales unsigned", "scales of 32"),
        *("scales 0 to 7", "scales by one", "d flushed"),
    ),
}


def unpack(kind: str, data: np.ndarray, fault: str = "") -> np.ndarray:
    """Rows of bytes [rows, ·] of a file as float32 [rows, width], as an engine with this fault has them."""
    size = SIZES[kind][1]
    blocks = data.reshape(len(data), -1, size)
    with np.errstate(all="ignore"):
        found = _KINDS[kind](blocks.astype(np.int64), Halves(blocks, fault), fault)
    return np.stack(found, axis=-1).reshape(len(data), -1).astype(np.float32)


def _q8_0(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, q = half(0), [b[..., 2 + i] for i in range(32)]
    if fault == "unsigned":
        return [d * x for x in q]
    return [d * (x - 128 if fault == "less 128" else np.where(x > 127, x - 256, x)) for x in q]


def _q4_0(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, q = half(0), nibbles(b, 2, 16, 16, fault)
    return [d * signed(x, 8, fault) for x in q]


def _q4_1(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, m = _plus(half, fault)
    return [d * x + m for x in nibbles(b, 4, 16, 16, fault)]


def _q5_0(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, bits = half(0), _fifth_bits([b[..., 2 + i] for i in range(4)], fault)
    offset = 8 if fault == "as Q4_0" else 16
    q = nibbles(b, 6, 16, 16, fault)
    return [d * signed(x | bit << 4, offset, fault) for x, bit in zip(q, bits, strict=True)]


def _q5_1(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, m = _plus(half, fault)
    q, bits = nibbles(b, 8, 16, 16, fault), _fifth_bits([b[..., 4 + i] for i in range(4)], fault)
    return [d * (x | bit << 4) + m for x, bit in zip(q, bits, strict=True)]


def _plus(half: Halves, fault: str) -> tuple[np.ndarray, np.ndarray]:
    d, m = (half(2), half(0)) if fault == "d and m" else (half(0), half(2))
    return d, {"mins missing": 0 * m, "mins subtracted": -m}.get(fault, m)


def _fifth_bits(top: Numbers, fault: str) -> Numbers:
    if fault == "high bits big-endian":
        top = top[::-1]
    word = top[0] | top[1] << 8 | top[2] << 16 | top[3] << 24
    bits = [word >> i & 1 for i in range(32)]
    if fault == "high bits turns":
        return [bits[2 * i] for i in range(16)] + [bits[2 * i + 1] for i in range(16)]
    if fault == "high bits exchanged":
        return bits[16:] + bits[:16]
    if fault == "high bits from the top":
        return bits[::-1]
    if fault == "high bits bytes from the top":
        return [bits[8 * (i // 8) + 7 - i % 8] for i in range(32)]
    return [0 * bit for bit in bits] if fault in ("high bits missing", "as Q4_0") else bits


def _iq4_nl(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d = half(0)
    return [d * (x - 8 if fault == "linear" else IQ4[x]) for x in nibbles(b, 2, 16, 16, fault)]


def _mxfp4(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    return [np.ldexp(E2M1[x], b[..., 0] - 127) for x in nibbles(b, 1, 16, 16, fault)]


_KINDS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4}
_KINDS |= LARGE
