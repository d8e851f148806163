"""Valid inputs broken in ways that reach a reader's insides: bytes, JSON trees, the fields of binary headers, words."""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

from weights.gguf_header import _Cursor

Mutation = Callable[[bytes, Random], bytes]

# Where integers of some width begin to be another thing than people think.
NUMBERS = (0, 1, 2, 3, 7, 12, 31, 32, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
NUMBERS += (1 << 32, 1 << 40, (1 << 61) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 4, (1 << 64) - 1)
STRANGE: tuple[Any, ...] = (
    None, True, False, -1, *NUMBERS, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324, "", "x", "\0", "a\nb",
    "../x", "/etc/passwd", "..", "a/b", "\x1b[31m", "\u202e", "x" * 5000, "9" * 5000, "yarn", "linear", "float16",
    "layer-0/attn_norm.bin", "attn_norm", [], {}, [[]], [None] * 100, [-1], [0, 0], [1] * 70, {"": None}, {"a": [1]},
)  # fmt: skip
# What no tree of Python's values has, put in place of a value in the text.
TEXTS = ("NaN", "-Infinity", "1e999", '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', "9" * 5000, "[" * 3000)
TEXTS += ("[" * 80 + "]" * 80, '{"a":1,"a":2}', "0x10", "'x'", "//", "\ufeff", "1" * 400, "[" * 200_000, '{"a":' * 9000)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flips, numbers, cuts, copies."""
    found = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        at = _place(len(found), random)
        size = random.choice((1, 1, 2, 4, 8, 64, 1 + len(found) // 4))
        kind = random.randrange(7)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << random.randrange(8)
        elif kind == 1:
            width = random.choice((1, 2, 4, 8))
            found[at : at + width] = (random.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            del found[at : at + size]
        elif kind == 4:
            found[at:at] = found[at : at + size]
        elif kind == 5:
            found[at : at + size] = bytes(random.choice((0, 255, 32, 48, 123)) for _ in range(min(size, 64)))
        else:
            there = _place(len(found), random)
            found[at : at + size] = found[there : there + size]
    return bytes(found)


def _place(size: int, random: Random) -> int:
    """A place in so many bytes; headers lie at the beginning."""
    return random.randrange(min(size, random.choice((16, 64, 1024, 1 << 30))) + 1)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Edits of the tree, now and then of the text."""
    if random.randrange(8) == 0:
        return mutate_bytes(data, random)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    for _ in range(random.randrange(1, 4)):
        tree = _edit_tree(tree, random)
    try:
        text = json.dumps(tree)
    except (ValueError, RecursionError):
        return data
    if random.randrange(4) == 0:
        values = list(re.finditer(r'(?<=[:\[,] )[-\w."]+(?=[,\]}])', text)) or list(re.finditer(r"^.*$", text, re.S))
        at = random.choice(values)
        text = text[: at.start()] + random.choice(TEXTS) + text[at.end() :]
    return text.encode("utf-8", "surrogatepass")


def _edit_tree(tree: Any, random: Random) -> Any:
    """One node replaced, removed, renamed, copied or put one level deeper."""
    nodes = [(parent, key) for parent in _containers(tree) for key in _keys(parent)]
    if not nodes:
        return deepcopy(random.choice(STRANGE))
    parent, key = random.choice(nodes)
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice([*parent, *(s for s in STRANGE if isinstance(s, str))])] = parent.pop(key)
    elif kind == 2:
        old = parent[key]
        parent[key] = random.choice(([old], {"a": old}, type(old).__name__, [old, deepcopy(old)]))
    elif kind == 3:
        other, there = random.choice(nodes)
        parent[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else other[there]))
    elif kind == 4 and isinstance(parent, list):
        parent.append(deepcopy(parent[key]))
    elif kind == 5 and isinstance(parent[key], (int, float)):
        parent[key] = random.choice((-parent[key], parent[key] + 1, parent[key] * 2, float(parent[key] % 2**53)))
    else:
        parent[key] = deepcopy(random.choice(STRANGE))  # a copy, since the next edit may be inside it
    return tree


def _containers(tree: Any) -> list[Any]:
    found, level = [], [tree]
    while level:
        level = [value for value in level if isinstance(value, (list, dict))]
        found += level
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return found


def _keys(parent: Any) -> list[Any]:
    return list(parent) if isinstance(parent, dict) else list(range(min(len(parent), 32)))


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Edits of the JSON header; its length follows more often than not."""
    if len(data) < 8 or random.randrange(5) == 0:
        return mutate_bytes(data, random)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], random)
    stated = random.choice(NUMBERS) if random.randrange(6) == 0 else len(header)
    return struct.pack("<Q", stated) + header + data[8 + length :]


class _Recording(_Cursor):
    """Notes where each field of a GGUF header lies."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.spans: list[tuple[int, int]] = []

    def take(self, size: int) -> bytes:
        found = super().take(size)
        self.spans.append((self.at - size, size))
        return found


def _gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """(place, size) of the numbers and strings of a header, as far as it is one."""
    cursor: Any = None
    try:
        with mmap.mmap(-1, max(1, len(data))) as mapped:
            mapped.write(data)
            cursor = _Recording(mapped)
            cursor.take(8)
            tensors, entries = cursor.number("Q"), cursor.number("Q")
            for _ in range(min(entries, 100)):
                cursor.string()
                cursor.value(cursor.number("I"))
            for _ in range(min(tensors, 400)):
                cursor.string()
                for code in "Q" * min(cursor.number("I"), 4) + "IQ":
                    cursor.number(code)
    except (ValueError, KeyError, MemoryError):
        pass
    return cursor.spans if cursor else []


def mutate_gguf(data: bytes, random: Random) -> bytes:
    """Other numbers in the fields of the header."""
    fields = _gguf_fields(data)
    if not fields or random.randrange(5) == 0:
        return mutate_bytes(data, random)
    found = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        at, size = random.choice(fields)
        if size in (1, 2, 4, 8):
            value = random.choice((*NUMBERS, *range(14), random.randrange(300)))
            found[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif size:
            there, length = random.choice([field for field in fields if field[1] > 8] or fields)
            part = random.choice((found[there : there + length], b"\xff" * size, b"\0" * size, b"9" * size))
            found[at : at + size] = part[:size].ljust(size, b".")  # names keep their length
    return bytes(found)


def text_of(data: bytes) -> str:
    """An input as text, halves of characters included."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def mutate_words(pieces: Sequence[str]) -> Mutation:
    """Texts put together of pieces that a grammar knows, and of some that it does not."""
    strange = (*" \0,\n\ud800é", "", ",,", "-1", "1_0", "+1", "٣", "1e3", "0x1", "9" * 30, "9" * 5000)

    def mutate(data: bytes, random: Random) -> bytes:
        words = re.findall(r"\w+|\W", text_of(data))
        for _ in range(random.randrange(1, 5)):
            at = random.randrange(len(words) + 1)
            words[at : at + random.randrange(3)] = [random.choice(strange if random.randrange(3) == 0 else pieces)]
        return "".join(words).encode("utf-8", "surrogatepass")

    return mutate
