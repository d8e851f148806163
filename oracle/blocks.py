"""GGUF's blocks of quantised weights by their parts: what is read wrongly is changed there, and dequantised as ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

# Bytes of each part of a block, as ggml-common.h declares it: the float16 scales `d` and `dmin` (Q4_1, Q5_1: m), the
# scales of its parts, the numbers' low bits `qs` and high bits `qh` (Q3_K: hmask, Q6_K: ql and qh).
PARTS: dict[str, dict[str, slice]] = {
    "Q8_0": {"d": slice(0, 2), "qs": slice(2, 34)},
    "Q4_0": {"d": slice(0, 2), "qs": slice(2, 18)},
    "Q4_1": {"d": slice(0, 2), "dmin": slice(2, 4), "qs": slice(4, 20)},
    "Q5_1": {"d": slice(0, 2), "dmin": slice(2, 4), "qh": slice(4, 8), "qs": slice(8, 24)},
    "IQ4_NL": {"d": slice(0, 2), "qs": slice(2, 18)},
    "IQ4_XS": {"d": slice(0, 2), "scales_h": slice(2, 4), "scales_l": slice(4, 8), "qs": slice(8, 136)},
    "MXFP4": {"e": slice(0, 1), "qs": slice(1, 17)},
    "Q5_0": {"d": slice(0, 2), "qh": slice(2, 6), "qs": slice(6, 22)},
    "Q2_K": {"scales": slice(0, 16), "qs": slice(16, 80), "d": slice(80, 82), "dmin": slice(82, 84)},
    "Q3_K": {"qh": slice(0, 32), "qs": slice(32, 96), "scales": slice(96, 108), "d": slice(108, 110)},
    "Q4_K": {"d": slice(0, 2), "dmin": slice(2, 4), "scales": slice(4, 16), "qs": slice(16, 144)},
    "Q5_K": {"d": slice(0, 2), "dmin": slice(2, 4), "scales": slice(4, 16), "qh": slice(16, 48), "qs": slice(48, 176)},
    "Q6_K": {"qs": slice(0, 128), "qh": slice(128, 192), "scales": slice(192, 208), "d": slice(208, 210)},
}
# Bits of a number in `qs`, and of how many bytes the lowest bits are read before the next ones.
BITS = {kind: 2 if kind in ("Q2_K", "Q3_K") else 4 for kind in PARTS if kind != "Q8_0"}
RUN = {kind: 16 for kind in BITS} | {"Q2_K": 32, "Q3_K": 32, "Q4_K": 32, "Q5_K": 32, "Q6_K": 64}


@dataclass(frozen=True)
class Blocks:
    """Rows of a tensor as they lie in a file: `data` [rows, blocks, bytes] uint8."""

    kind: str
    data: np.ndarray

    @classmethod
    def of(cls, kind: str, raw: np.ndarray) -> Blocks:
        """Rows of bytes [rows, bytes]."""
        return cls(kind, raw.reshape(len(raw), -1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]))

    def part(self, name: str) -> np.ndarray:
        """The bytes of one part [rows, blocks, ·]."""
        return self.data[..., PARTS[self.kind][name]]

    def having(self, **parts: np.ndarray | int) -> Blocks:
        """The same with other bytes in some parts; a number stands for each of a part's bytes."""
        data = self.data.copy()
        for name, value in parts.items():
            data[..., PARTS[self.kind][name]] = value
        return Blocks(self.kind, data)

    def with_scales(self, d: np.ndarray, dmin: np.ndarray | None = None) -> np.ndarray:
        """The numbers [rows, width], linear in both scales, with others [rows, blocks], which need not be float16."""
        one = np.array([1.0], np.float16).view(np.uint8)
        if dmin is None:
            return self._times(self.having(d=one), d)
        return self._times(self.having(d=one, dmin=0), d) + self._times(self.having(d=0, dmin=one), dmin)

    def _times(self, blocks: Blocks, scale: np.ndarray) -> np.ndarray:
        values = blocks.values()
        return (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(values.shape)

    def values(self) -> np.ndarray:
        """The numbers [rows, width] in float64, each as ggml has it in float32."""
        rows, kind = self.data.reshape(len(self.data), -1), GGMLQuantizationType[self.kind]
        with np.errstate(all="ignore"):
            return quants.dequantize(rows, kind).astype(np.float64)


# What somebody makes of blocks: the numbers [rows, width] in float64.
Read = Callable[[Blocks], np.ndarray]


def numbers(qs: np.ndarray, bits: int, run: int, *, turned: bool = False) -> np.ndarray:
    """Numbers of `bits` bits [..., n] out of bytes: of `run` bytes the lowest bits, the next ones, and so on.

    `turned`: the highest first.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = qs.reshape(*qs.shape[:-1], -1, 1, run) >> (shifts[::-1] if turned else shifts)
    return (groups & np.uint8((1 << bits) - 1)).reshape(*qs.shape[:-1], -1)


def packed(values: np.ndarray, bits: int, run: int) -> np.ndarray:
    """The bytes that `numbers` reads these from."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = values.reshape(*values.shape[:-1], -1, 8 // bits, run) << shifts
    return np.bitwise_or.reduce(groups, axis=-2).astype(np.uint8).reshape(*values.shape[:-1], -1)


def moved_bits(data: np.ndarray, order: list[int]) -> np.ndarray:
    """Bytes [..., n] whose bit i, of each `len(order)` bits counted from the lowest, is what was bit order[i]."""
    bits = np.unpackbits(data, axis=-1, bitorder="little")
    groups = bits.reshape(*data.shape[:-1], -1, len(order))[..., order]
    return np.packbits(groups.reshape(bits.shape), axis=-1, bitorder="little")


def scales_and_mins(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and the eight mins, six bits each, of the twelve bytes of Q4_K and Q5_K [..., 12]."""
    scale, least = quants.Q4_K.get_scale_min(scales.reshape(-1, 12))
    return scale.reshape(*scales.shape[:-1], 8), least.reshape(*scales.shape[:-1], 8)


def scale_bytes(scale: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The twelve bytes that `scales_and_mins` reads these from."""
    low = [part[..., :4] | (part[..., 4:] >> 4 << 6) for part in (scale, least)]
    return np.concatenate([*low, (scale[..., 4:] & 15) | (least[..., 4:] & 15) << 4], axis=-1).astype(np.uint8)
