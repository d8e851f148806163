"""GGUF's quantised blocks unpacked by loops like those of ggml-quants.c, number by number of a block, with faults."""

from __future__ import annotations

import numpy as np

SIZES = {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q5_0": (32, 22), "Q2_K": (256, 84), "Q3_K": (256, 110)}
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
        found = _KINDS[kind](blocks.astype(np.int64), _Halves(blocks, fault), fault)
    return np.stack(found, axis=-1).reshape(len(data), -1).astype(np.float32)


class _Halves:
    """float16 numbers of each block [rows, blocks], as an engine reads them."""

    def __init__(self, blocks: np.ndarray, fault: str) -> None:
        self.blocks, self.fault = blocks, fault

    def __call__(self, at: int) -> np.ndarray:
        bits = self.blocks[..., at].astype(np.uint32) | self.blocks[..., at + 1].astype(np.uint32) << 8
        value = self._float32(bits)
        return np.repeat(value[:, :1], value.shape[1], axis=1) if self.fault == "d of the first" else value

    def _float32(self, bits: np.ndarray) -> np.ndarray:
        """By shifting bits, as those do who have no instruction for it."""
        if self.fault == "d as bfloat16":
            return (bits << 16).view(np.float32)
        sign, exponent, mantissa = bits >> 15 << 31, bits >> 10 & 31, bits & 1023
        normal = (sign | (exponent + 112) << 23 | mantissa << 13).view(np.float32)
        small = {"d flushed": 0 * normal, "d as normal": normal}.get(
            self.fault, mantissa.astype(np.float32) * np.float32(2.0**-24) * np.where(sign > 0, -1, 1)
        )
        return np.where(exponent == 0, small, normal).astype(np.float32)


Numbers = list[np.ndarray]


def _q8_0(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, q = half(0), [b[..., 2 + i] for i in range(32)]
    if fault == "unsigned":
        return [d * x for x in q]
    return [d * (x - 128 if fault == "less 128" else np.where(x > 127, x - 256, x)) for x in q]


def _q4_0(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, q = half(0), _nibbles(b, 2, 16, 16, fault)
    return [d * _signed(x, 8, fault) for x in q]


def _q5_0(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, q, top = half(0), _nibbles(b, 6, 16, 16, fault), [b[..., 2 + i] for i in range(4)]
    if fault == "high bits big-endian":
        top = top[::-1]
    word = top[0] | top[1] << 8 | top[2] << 16 | top[3] << 24
    bits = [word >> i & 1 for i in range(32)]
    if fault == "high bits turns":
        bits = [bits[2 * i] for i in range(16)] + [bits[2 * i + 1] for i in range(16)]
    elif fault == "high bits exchanged":
        bits = bits[16:] + bits[:16]
    elif fault == "high bits from the top":
        bits = bits[::-1]
    elif fault == "high bits bytes from the top":
        bits = [bits[8 * (i // 8) + 7 - i % 8] for i in range(32)]
    if fault in ("high bits missing", "as Q4_0"):
        bits = [0 * bit for bit in bits]
    offset = 8 if fault == "as Q4_0" else 16
    return [d * _signed(x | bit << 4, offset, fault) for x, bit in zip(q, bits, strict=True)]


def _q2_k(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, least = _two(half(80), half(82), fault)
    found = []
    for i in range(256):
        byte = b[..., 16 + i // 128 * 32 + i % 32]
        place = i % 128 // 32
        if fault == "runs of 1":
            byte, place = b[..., 16 + i // 4], i % 4
        shift = 2 * (3 - place if fault == "bits exchanged" else place)
        scale, m = b[..., i // 16] & 15, b[..., i // 16] >> 4
        if fault == "scales and mins":
            scale, m = m, scale
        found.append(d * scale * (byte >> shift & 3) - least * m)
    return found


def _q3_k(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, found = half(108), []
    for i in range(256):
        j = i // 16
        low = b[..., 96 + j % 8] >> 4 * (j // 8) & 15
        high = 0 if fault == "scale bits missing" else b[..., 104 + j % 4] >> 2 * (j // 4) & 3
        scale = (low | high << 4) - (0 if fault == "scale offset" else 32)
        byte, place = b[..., 32 + i // 128 * 32 + i % 32], i % 128 // 32
        if fault == "runs of 1":
            byte, place = b[..., 32 + i // 4], i % 4
        bit = {"high bits from the top": 7 - i // 32, "high bits unshifted": 0}.get(fault, i // 32)
        masked = b[..., i % 32] >> bit & 1
        less = {"high bits missing": 4 + 0 * masked, "high bits set": 0 * masked, "offset missing": -4 * masked}
        less["high bits inverted"] = 4 * masked
        found.append(d * scale * ((byte >> 2 * place & 3) - less.get(fault, 4 * (1 - masked))))
    return found


def _q4_k(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, least = _two(half(0), half(2), fault)
    q, scales = _nibbles(b, 16, 128, 32, fault), _scale_min_k4(b, fault)
    return [d * scales[i // 32][0] * x - least * scales[i // 32][1] for i, x in enumerate(q)]


def _q5_k(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, least = _two(half(0), half(2), fault)
    q, scales, found = _nibbles(b, 48, 128, 32, fault), _scale_min_k4(b, fault), []
    for i, x in enumerate(q):
        chunk, upper = i // 64, i % 64 // 32
        bit = {"high bits halves": chunk + 4 * upper, "high bits exchanged": 2 * chunk + 1 - upper}.get(
            fault, {"high bits from the top": 7 - i // 32, "high bits unshifted": upper}.get(fault, i // 32)
        )
        top = 0 if fault == "high bits missing" else (b[..., 16 + i % 32] >> bit & 1) << 4
        found.append(d * scales[i // 32][0] * (x + top) - least * scales[i // 32][1])
    return found


def _q6_k(b: np.ndarray, half: _Halves, fault: str) -> Numbers:
    d, q, found = half(208), _nibbles(b, 0, 128, 64, fault), []
    shifts = {"high bits exchanged": (0, 4, 2, 6), "high bits from the top": (6, 4, 2, 0)}
    shifts["high bits unshifted"] = (0, 0, 0, 0)
    for i, x in enumerate(q):
        chunk, group = i // 128, i % 128 // 32
        shift = shifts.get(fault, (0, 2, 4, 6))[group]
        top = 0 if fault == "high bits missing" else (b[..., 128 + 32 * chunk + i % 32] >> shift & 3) << 4
        place = {"scales of 32": i // 32 * 2, "scales 0 to 7": i // 32}.get(fault, i // 16)
        if fault == "scales by one":
            place = 8 * chunk + group + i % 32 // 16
        scale = b[..., 192 + place]
        scale = scale if fault == "scales unsigned" else np.where(scale > 127, scale - 256, scale)
        found.append(d * scale * _signed(x | top, 32, fault))
    return found


def _nibbles(b: np.ndarray, start: int, count: int, run: int, fault: str) -> Numbers:
    """`count` bytes as twice as many numbers: of `run` bytes the low halves first, then the high ones."""
    run = int(fault.removeprefix("runs of ")) if fault.startswith("runs of ") else run
    low, high = (4, 0) if fault == "bits exchanged" else (0, 4)
    found = []
    for first in range(0, count, run):
        found += [b[..., start + first + i] >> low & 15 for i in range(run)]
        found += [b[..., start + first + i] >> high & 15 for i in range(run)]
    return found


def _signed(x: np.ndarray, offset: int, fault: str) -> np.ndarray:
    if fault == "signed":
        return np.where(x >= offset, x - 2 * offset, x)
    return x if fault == "offset missing" else x - offset


def _two(d: np.ndarray, least: np.ndarray, fault: str) -> tuple[np.ndarray, np.ndarray]:
    if fault == "d and dmin":
        return least, d
    return d, {"mins missing": 0 * least, "mins added": -least}.get(fault, least)


def _scale_min_k4(b: np.ndarray, fault: str) -> list[tuple[np.ndarray, np.ndarray]]:
    q = [b[..., 4 + i] for i in range(12)]
    if fault == "scales in a row":
        word = sum(byte.astype(object) << 8 * i for i, byte in enumerate(q))
        six = [((word >> 6 * i) & 63).astype(np.int64) for i in range(16)]
        return list(zip(six[:8], six[8:], strict=True))
    mask = 255 if fault == "scale bits unmasked" else 63
    found = [(q[j] & mask, q[j + 4] & mask) for j in range(4)]
    for j in range(4, 8):
        above = (0, 0) if fault == "scale bits missing" else (q[j - 4] >> 6 << 4, q[j] >> 6 << 4)
        found.append((q[j + 4] & 15 | above[0], q[j + 4] >> 4 | above[1]))
    return [(m, s) for s, m in found] if fault == "scales and mins" else found


_KINDS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q2_K": _q2_k, "Q3_K": _q3_k}
_KINDS |= {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
