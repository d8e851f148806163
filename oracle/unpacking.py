"""THE table of misreadings: what engines get wrong that unpack GGUF's quantised weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oracle import block_reads as reads
from oracle.blocks import BITS, PARTS, RUN, Read

SCALED = tuple(kind for kind, parts in PARTS.items() if "d" in parts)  # a float16 scale a block
SHARED = tuple(BITS)  # numbers share bytes
HIGH = tuple(kind for kind, parts in PARTS.items() if "qh" in parts)  # numbers have bits in qh too
OFFSET = ("Q4_0", "Q5_0", "Q3_K", "Q6_K")  # numbers are stored with an offset
MINS, LEAST = ("Q2_K", "Q4_K", "Q5_K"), ("Q4_1", "Q5_1")  # a second number, subtracted or added
SIX_BITS = ("Q4_K", "Q5_K")  # scales and mins in twelve bytes
FIFTH = ("Q5_0", "Q5_1")  # the highest bits of 32 numbers in four bytes
BYTES = ("Q2_K", "Q6_K")  # a byte a scale, of 16 numbers


@dataclass(frozen=True)
class Misreading:
    """One row: `read` gives the numbers [rows, width] as an engine has them that does this."""

    name: str
    kinds: tuple[str, ...]
    read: Read
    words: str


# Of some types: a name, which bits of qh are taken for which (as many as repeat), and how a person says it.
HIGH_BITS: tuple[tuple[tuple[str, ...], str, list[int], str], ...] = (
    (FIFTH, "turns", [*range(0, 32, 2), *range(1, 32, 2)], "fifth bits are taken as lying side by side for a byte"),
    (
        FIFTH,
        "exchanged",
        [*range(16, 32), *range(16)],
        "low and high numbers have each other's fifth bits",
    ),
    (FIFTH, "from the top", [*range(31, -1, -1)], "fifth bits are read from the highest on"),
    (FIFTH, "bytes from the top", [i ^ 7 for i in range(32)], "fifth bits are read from the highest of each byte on"),
    (FIFTH, "big-endian", [i ^ 24 for i in range(32)], "fifth bits are read as a big-endian number"),
    (("Q5_K",), "halves", [0, 4, 1, 5, 2, 6, 3, 7], "low numbers have bits 0 to 3 of qh, high ones 4 to 7"),
    (("Q5_K",), "exchanged", [1, 0, 3, 2, 5, 4, 7, 6], "low and high numbers have each other's fifth bits"),
    (("Q5_K",), "from the top", [7, 6, 5, 4, 3, 2, 1, 0], "bits of qh are read from the highest on"),
    (("Q5_K",), "unshifted", [0, 1] * 4, "each 64 numbers have the fifth bits of the first 64"),
    (("Q6_K",), "exchanged", [0, 1, 4, 5, 2, 3, 6, 7], "qh is shifted by 0, 4, 2, 6 and not by 0, 2, 4, 6"),
    (("Q6_K",), "from the top", [6, 7, 4, 5, 2, 3, 0, 1], "qh is shifted by 6, 4, 2, 0 and not by 0, 2, 4, 6"),
    (("Q6_K",), "unshifted", [0, 1] * 4, "qh is not shifted"),
    (("Q3_K",), "from the top", [7, 6, 5, 4, 3, 2, 1, 0], "bits of hmask are read from the highest on"),
    (("Q3_K",), "unshifted", [0] * 8, "the mask for a bit of hmask is not shifted"),
)

# Numbers of bytes that each type's bits are not read in runs of, and could be.
RUNS = {
    run: tuple(kind for kind in SHARED if run != RUN[kind] and run <= PARTS[kind]["qs"].stop - PARTS[kind]["qs"].start)
    for run in (16, 32, 64, 128)
}

MISREADINGS: tuple[Misreading, ...] = (
    Misreading("runs of 1", SHARED, reads.runs(1), "the numbers of a byte are read one after another"),
    *(
        Misreading(f"runs of {run}", kinds, reads.runs(run), f"of {run} bytes the low bits are read, then the high")
        for run, kinds in RUNS.items()
    ),
    Misreading("bits exchanged", SHARED, reads.turned, "high bits of a byte are read for low ones"),
    Misreading("offset missing", OFFSET, reads.no_offset, "the offset is not subtracted from the numbers"),
    Misreading("signed", ("Q4_0", "Q5_0", "Q6_K"), reads.signed, "numbers with an offset are read as two's complement"),
    Misreading("linear", ("IQ4_NL", "IQ4_XS"), reads.linear, "8 is subtracted from places in a table"),
    Misreading("unsigned", ("Q8_0",), reads.unsigned_numbers, "numbers are read as unsigned bytes"),
    Misreading("less 128", ("Q8_0",), reads.less_128, "numbers are read as unsigned bytes, less 128"),
    Misreading("high bits missing", HIGH, reads.no_high_bits, "the high bits in qh are not used"),
    Misreading("as Q4_0", ("Q5_0",), reads.as_q4_0, "fifth bits are not used, and 8 is subtracted as in Q4_0"),
    Misreading("high bits inverted", ("Q3_K",), reads.inverted, "4 is subtracted where hmask's bit is set"),
    Misreading("high bits set", ("Q3_K",), reads.all_high_bits, "4 is subtracted nowhere"),
    *(Misreading(f"high bits {name}", kinds, reads.high_bits(order), words) for kinds, name, order, words in HIGH_BITS),
    Misreading("scale bits missing", SIX_BITS, reads.six_bits_low, "the last four scales and mins lack two high bits"),
    Misreading("scale bits missing", ("Q3_K",), reads.low_scales, "scales lack their two high bits"),
    Misreading("scale bits unmasked", SIX_BITS, reads.unmasked, "the first four scales and mins are not masked by 63"),
    Misreading("scales and mins", SIX_BITS, reads.six_bits_exchanged, "scales and mins are exchanged"),
    Misreading("scales and mins", ("Q2_K",), reads.nibbles_exchanged, "scales and mins are exchanged"),
    Misreading("scales in a row", SIX_BITS, reads.six_bits_in_a_row, "scales and mins are read as 6 bits in a row"),
    Misreading("scale bits missing", ("IQ4_XS",), reads.no_high_scales, "scales lack their two high bits"),
    Misreading("scale offset", ("Q3_K", "IQ4_XS"), reads.no_scale_offset, "32 is not subtracted from scales"),
    Misreading("scales unsigned", ("Q6_K",), reads.unsigned_scales, "scales are read as unsigned bytes"),
    Misreading(
        "scales of 32", BYTES, reads.other_scales([i & ~1 for i in range(16)]), "each 32 numbers have one scale of two"
    ),
    Misreading(
        "scales 0 to 7",
        BYTES,
        reads.other_scales([i // 2 for i in range(16)]),
        "scales 0 to 7 are taken for 32 numbers each",
    ),
    Misreading(
        "scales by one",
        BYTES,
        reads.other_scales([i // 8 * 8 + i % 8 // 2 + i % 2 for i in range(16)]),
        "the scales of each 32 of 128 numbers are one further on, not two",
    ),
    Misreading("mins missing", MINS, reads.no_mins, "mins are not subtracted"),
    Misreading("mins added", MINS, reads.mins_added, "mins are added, not subtracted"),
    Misreading("mins missing", LEAST, reads.no_mins, "m is not added"),
    Misreading("mins subtracted", LEAST, reads.mins_added, "m is subtracted, not added"),
    Misreading("d and m", LEAST, reads.exchanged, "d and m are exchanged"),
    Misreading("d and dmin", MINS, reads.exchanged, "d and dmin are exchanged"),
    Misreading("d flushed", SCALED, reads.flushed, "scales below float16's smallest normal number are taken for 0"),
    Misreading("d as normal", SCALED, reads.as_normal, "scales below float16's smallest normal number get a leading 1"),
    Misreading("d as bfloat16", SCALED, reads.as_bfloat16, "float16 scales are read as bfloat16"),
    Misreading("d of the first", SCALED, reads.first, "all blocks of a row have the first one's scale"),
)


def misreadings(kind: str) -> Iterator[Misreading]:
    """The rows about one type of GGUF."""
    return (row for row in MISREADINGS if kind in row.kinds)
