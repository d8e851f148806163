"""Blocks of GGUF's quantised weights read as their types are not meant: what the rows of `unpacking.py` are made of."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from oracle.blocks import BITS, PARTS, RUN, Blocks, Read, moved_bits, numbers, packed, scale_bytes, scales_and_mins


def part(name: str, change: Callable[[np.ndarray], np.ndarray | int]) -> Read:
    """One part read as if other bytes lay there."""
    return lambda blocks: blocks.having(**{name: change(blocks.part(name))}).values()


# --- the numbers


def runs(run: int) -> Read:
    """The numbers in the order of another run of bytes, their scales by the places that they come to."""

    def read(blocks: Blocks) -> np.ndarray:
        bits, qs = BITS[blocks.kind], blocks.part("qs")
        return blocks.having(qs=packed(numbers(qs, bits, min(run, qs.shape[-1])), bits, RUN[blocks.kind])).values()

    return read


def turned(blocks: Blocks) -> np.ndarray:
    """The highest bits of a byte read for the lowest."""
    bits, run = BITS[blocks.kind], RUN[blocks.kind]
    return blocks.having(qs=packed(numbers(blocks.part("qs"), bits, run, turned=True), bits, run)).values()


def _zero(blocks: Blocks) -> np.ndarray:
    """What a stored zero comes to: the offset, with its scale."""
    return blocks.having(**{name: 0 for name in ("qs", "qh") if name in PARTS[blocks.kind]}).values()


def no_offset(blocks: Blocks) -> np.ndarray:
    """The stored numbers as they are, without what makes them negative."""
    return blocks.values() - _zero(blocks)


def as_q4_0(blocks: Blocks) -> np.ndarray:
    """Q5_0 without the fifth bits, and with Q4_0's offset, which is half as large."""
    return blocks.having(qh=0).values() - _zero(blocks) / 2


def signed(blocks: Blocks) -> np.ndarray:
    """The stored numbers in two's complement: their highest bit is turned over, and the offset does the rest."""
    name, mask = {"Q4_0": ("qs", 0x88), "Q5_0": ("qh", 0xFF), "Q6_K": ("qh", 0xAA)}[blocks.kind]
    return blocks.having(**{name: blocks.part(name) ^ mask}).values()


def linear(blocks: Blocks) -> np.ndarray:
    """The numbers of IQ4 less 8, where they are places in a table; that has 1 at place 8."""
    units = blocks.having(qs=0x88).values()
    return units * (numbers(blocks.part("qs"), 4, RUN[blocks.kind]).astype(np.float64) - 8).reshape(units.shape)


def unsigned(name: str) -> Read:
    """Bytes of -128 to 127 read as 0 to 255. The numbers are linear in them."""

    def read(blocks: Blocks) -> np.ndarray:
        shifted, least = blocks.having(**{name: blocks.part(name) ^ 0x80}), blocks.having(**{name: 0x80})
        return shifted.values() - least.values()

    return read


def high_bits(order: list[int]) -> Read:
    """Bit order[i] of each `len(order)` high bits for bit i."""
    return part("qh", lambda qh: moved_bits(qh, order))


# --- scales within a block


def _six_bits(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Read:
    return part("scales", lambda scales: scale_bytes(*change(*scales_and_mins(scales))))


def _four_bits(x: np.ndarray) -> np.ndarray:
    return np.where(np.arange(8) < 4, x, x & 15)


six_bits_exchanged = _six_bits(lambda scale, least: (least, scale))
six_bits_low = _six_bits(lambda scale, least: (_four_bits(scale), _four_bits(least)))
no_high_scales = part("scales_h", lambda scales: 0)
# Q3_K: the last four bytes hold the scales' high bits.
low_scales = part("scales", lambda scales: np.where(np.arange(12) < 8, scales, 0))


def unmasked(blocks: Blocks) -> np.ndarray:
    """The first four scales and mins with the two bits above them, which are of the others: 64 times those more."""
    above = np.zeros_like(blocks.part("scales"))
    above[..., :8] = blocks.part("scales")[..., :8] >> 6
    return blocks.values() + 64 * blocks.having(scales=above).values()


def _in_a_row(scales: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(scales, axis=-1, bitorder="little").reshape(*scales.shape[:-1], 16, 6)
    read = (bits << np.arange(6, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return scale_bytes(read[..., :8], read[..., 8:])


six_bits_in_a_row = part("scales", _in_a_row)


def no_scale_offset(blocks: Blocks) -> np.ndarray:
    """Scales of six bits as they are stored, 0 to 63."""
    names = [name for name in PARTS[blocks.kind] if name.startswith("scales")]
    return blocks.values() - blocks.having(**dict.fromkeys(names, 0)).values()


def other_scales(order: list[int]) -> Read:
    """Scale order[i] for scale i, where each has a byte."""
    return part("scales", lambda scales: scales[..., order])


# --- scales of whole blocks


def scaled(change: Callable[[np.ndarray], np.ndarray]) -> Read:
    """`d`, and `dmin` where there is one, as other numbers made of their bits [rows, blocks] uint16."""

    def read(blocks: Blocks) -> np.ndarray:
        names = [name for name in ("d", "dmin") if name in PARTS[blocks.kind]]
        bits = [np.ascontiguousarray(blocks.part(name)).view(np.uint16)[..., 0] for name in names]
        with np.errstate(all="ignore"):
            return blocks.with_scales(*(change(each).astype(np.float64) for each in bits))

    return read


def exchanged(blocks: Blocks) -> np.ndarray:
    """`d` for `dmin`, and the other way round."""
    return blocks.having(d=blocks.part("dmin"), dmin=blocks.part("d")).values()


def _as_normal(bits: np.ndarray) -> np.ndarray:
    """Numbers below the smallest normal one with the leading 1 that they have not, and the exponent 0 - 15."""
    wrong = np.ldexp(1 + (bits & 0x3FF) / 1024, -15) * np.where(bits & 0x8000, -1, 1)
    return np.where(bits & 0x7C00, bits.view(np.float16), wrong)


flushed = scaled(lambda bits: np.where(bits & 0x7C00, bits.view(np.float16), 0))
as_normal = scaled(_as_normal)
as_bfloat16 = scaled(lambda bits: bits.view(ml_dtypes.bfloat16))
first = scaled(lambda bits: np.broadcast_to(bits.view(np.float16)[:, :1], bits.shape))
unsigned_numbers, unsigned_scales = unsigned("qs"), unsigned("scales")
less_128 = part("qs", lambda qs: qs ^ 0x80)
no_high_bits, all_high_bits = part("qh", lambda qh: 0), part("qh", lambda qh: 0xFF)
inverted = part("qh", np.invert)
no_mins, mins_added = part("dmin", lambda dmin: 0), part("dmin", lambda dmin: dmin ^ np.array([0, 0x80], np.uint8))
nibbles_exchanged = part("scales", lambda scales: scales >> 4 | scales << 4)
