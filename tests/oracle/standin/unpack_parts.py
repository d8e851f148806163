"""What all of GGUF's blocks are read with: float16 numbers by their bits, halves of bytes, offsets; with faults."""

from __future__ import annotations

import numpy as np

# Of ggml-common.h.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Numbers = list[np.ndarray]


class Halves:
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


def nibbles(b: np.ndarray, start: int, count: int, run: int, fault: str) -> Numbers:
    """`count` bytes as twice as many numbers: of `run` bytes the low halves first, then the high ones."""
    run = int(fault.removeprefix("runs of ")) if fault.startswith("runs of ") else run
    low, high = (4, 0) if fault == "bits exchanged" else (0, 4)
    found = []
    for first in range(0, count, run):
        found += [b[..., start + first + i] >> low & 15 for i in range(run)]
        found += [b[..., start + first + i] >> high & 15 for i in range(run)]
    return found


def signed(x: np.ndarray, offset: int, fault: str) -> np.ndarray:
    if fault == "signed":
        return np.where(x >= offset, x - 2 * offset, x)
    return x if fault == "offset missing" else x - offset
