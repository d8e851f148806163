"""Blocks of 256 numbers unpacked by loops like those of ggml-quants.c, with faults."""

from __future__ import annotations

import numpy as np

from tests.oracle.standin.unpack_parts import IQ4, Halves, Numbers, nibbles, signed


def _q2_k(b: np.ndarray, half: Halves, fault: str) -> Numbers:
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


def _q3_k(b: np.ndarray, half: Halves, fault: str) -> Numbers:
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


def _q4_k(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, least = _two(half(0), half(2), fault)
    q, scales = nibbles(b, 16, 128, 32, fault), _scale_min_k4(b, fault)
    return [d * scales[i // 32][0] * x - least * scales[i // 32][1] for i, x in enumerate(q)]


def _q5_k(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, least = _two(half(0), half(2), fault)
    q, scales, found = nibbles(b, 48, 128, 32, fault), _scale_min_k4(b, fault), []
    for i, x in enumerate(q):
        chunk, upper = i // 64, i % 64 // 32
        bit = {"high bits halves": chunk + 4 * upper, "high bits exchanged": 2 * chunk + 1 - upper}.get(
            fault, {"high bits from the top": 7 - i // 32, "high bits unshifted": upper}.get(fault, i // 32)
        )
        top = 0 if fault == "high bits missing" else (b[..., 16 + i % 32] >> bit & 1) << 4
        found.append(d * scales[i // 32][0] * (x + top) - least * scales[i // 32][1])
    return found


def _q6_k(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, q, found = half(208), nibbles(b, 0, 128, 64, fault), []
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
        found.append(d * scale * signed(x | top, 32, fault))
    return found


def _iq4_xs(b: np.ndarray, half: Halves, fault: str) -> Numbers:
    d, found = half(0), []
    high = b[..., 2] | b[..., 3] << 8
    for i, x in enumerate(nibbles(b, 8, 128, 16, fault)):
        part = i // 32
        scale = b[..., 4 + part // 2] >> 4 * (part % 2) & 15
        scale = scale if fault == "scale bits missing" else scale | (high >> 2 * part & 3) << 4
        scale = scale - (0 if fault == "scale offset" else 32)
        found.append((d * scale).astype(np.float32) * (x - 8 if fault == "linear" else IQ4[x]))
    return found


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


LARGE = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs}
