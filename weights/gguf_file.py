"""One GGUF file under Hugging Face's tensor names, memory-mapped, dequantised row by row to what an engine sees."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from weights.errors import UserError, brief
from weights.gguf_header import Header, Stored, read_header
from weights.mapped import MappedFile, OfMap

# One row a tensor: its name in GGUF and in Hugging Face's checkpoints. Both store [out, in]; q and k are not permuted,
# as these architectures rotate by halves ("NEOX"). GGUF stacks the experts [E, out, in]; here each has its own name.
_LAYER = "model.layers.{layer}."
NAMES: dict[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{layer}.attn_norm.weight": _LAYER + "input_layernorm.weight",
    "blk.{layer}.attn_q.weight": _LAYER + "self_attn.q_proj.weight",
    "blk.{layer}.attn_k.weight": _LAYER + "self_attn.k_proj.weight",
    "blk.{layer}.attn_v.weight": _LAYER + "self_attn.v_proj.weight",
    "blk.{layer}.attn_q.bias": _LAYER + "self_attn.q_proj.bias",
    "blk.{layer}.attn_k.bias": _LAYER + "self_attn.k_proj.bias",
    "blk.{layer}.attn_v.bias": _LAYER + "self_attn.v_proj.bias",
    "blk.{layer}.attn_q_norm.weight": _LAYER + "self_attn.q_norm.weight",
    "blk.{layer}.attn_k_norm.weight": _LAYER + "self_attn.k_norm.weight",
    "blk.{layer}.attn_output.weight": _LAYER + "self_attn.o_proj.weight",
    "blk.{layer}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
    "blk.{layer}.ffn_gate.weight": _LAYER + "mlp.gate_proj.weight",
    "blk.{layer}.ffn_up.weight": _LAYER + "mlp.up_proj.weight",
    "blk.{layer}.ffn_down.weight": _LAYER + "mlp.down_proj.weight",
    "blk.{layer}.ffn_gate_inp.weight": _LAYER + "mlp.gate.weight",
    "blk.{layer}.ffn_gate_exps.weight": _LAYER + "mlp.experts.{expert}.gate_proj.weight",
    "blk.{layer}.ffn_up_exps.weight": _LAYER + "mlp.experts.{expert}.up_proj.weight",
    "blk.{layer}.ffn_down_exps.weight": _LAYER + "mlp.experts.{expert}.down_proj.weight",
}

PLAIN: dict[Kind, np.dtype[Any]] = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Those for which the `gguf` package gives the same bits as ggml itself.
_BY_32 = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")  # numbers a block
_BY_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0")
_FROM_TABLES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")  # 256 as well
QUANTISED = tuple(Kind[name] for name in (*_BY_32, *_BY_256, *_FROM_TABLES))
EVERY = ".*."  # in the name of a stack: all experts
# Values dequantised at once: the arrays that this takes on the way stay in the processor's cache.
AT_ONCE = 1 << 16
# Bytes of an expert's matrix: a stack of smaller ones is none, and its names would take far more memory than the file.
LEAST_EXPERT = 64


class GgufFile(OfMap):
    """Tensors of one file: views of plain numbers, float32 copies of quantised ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = MappedFile(path)
            self._map = self._file.bytes
            header = read_header(self._map)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a whole GGUF file: {error}") from None
        self.metadata = header.metadata
        self.entries = self._entries(header)
        self.header_sha256 = hashlib.sha256(self._map[: header.length]).hexdigest()
        self.bytes_read = 0
        self._lock = threading.Lock()

    def _entries(self, header: Header) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for gguf, whole in header.tensors.items():
            for name, stored in _named(gguf, whole):
                if name in found:
                    raise UserError(f"{self.path}: {brief(gguf)} is {brief(name)}, which is there already")
                found[name] = stored
        return found

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return len(self._map)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the header states, row-major."""
        return self.entries[name].shape

    def stored_as(self, name: str) -> str:
        """GGUF's name of the type on disk."""
        return self.entries[name].kind.name

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that `tensor` gives. Raises `UserError` for a type that is not supported."""
        stored = self.entries[name]
        if stored.kind in QUANTISED and len(stored.shape) > 1:
            return np.dtype(np.float32)
        if stored.kind not in PLAIN:
            known = ", ".join(kind.name for kind in (*PLAIN, *QUANTISED))
            raise UserError(
                f"{self.path}: {name} {list(stored.shape)} is stored as {stored.kind.name}; "
                f"supported are {known}, and for vectors the first three"
            )
        return PLAIN[stored.kind]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis: a read-only view, or a float32 array where they are quantised.

        Raises `UserError` where the file is no longer the one that was opened.
        """
        self._file.check()
        stored, dtype = self.entries[name], self.dtype(name)
        count = stored.shape[0]
        stop = count if stop is None else min(stop, count)
        row = stored.nbytes // count  # bytes
        raw = np.frombuffer(self._map, np.uint8, (stop - start) * row, stored.offset + start * row)
        return self._values(stored, dtype, raw.reshape(-1, row))

    def rows(self, name: str, places: np.ndarray) -> np.ndarray:
        """Copies of these rows of the first axis; no others are read. Raises `UserError` as `tensor`."""
        self._file.check()
        stored = self.entries[name]
        return self._values(stored, self.dtype(name), self._raw(stored)[places])

    def packed(self, name: str, rows: slice | np.ndarray) -> np.ndarray:
        """The bytes [rows, ·] of these rows as they lie in the file. Raises `UserError` as `tensor`."""
        self._file.check()
        return self._raw(self.entries[name])[rows]

    def _raw(self, stored: Stored) -> np.ndarray:
        return np.frombuffer(self._map, np.uint8, stored.nbytes, stored.offset).reshape(stored.shape[0], -1)

    def _values(self, stored: Stored, dtype: np.dtype[Any], raw: np.ndarray) -> np.ndarray:
        """The numbers of rows of bytes: the same memory, or dequantised."""
        with self._lock:
            self.bytes_read += raw.nbytes
        shape = (len(raw), *stored.shape[1:])
        if stored.kind in PLAIN:
            return raw.view(dtype).reshape(shape)
        return _dequantised(raw, stored.kind, math.prod(shape[1:])).reshape(shape)


def hugging_face_name(gguf: str) -> str | None:
    """What a tensor of a GGUF file is called in Hugging Face's checkpoints; of a stack of experts with `*` for them."""
    layer = re.match(r"blk\.(\d+)\.", gguf)
    number = layer[1] if layer else ""
    name = NAMES.get(gguf.replace(f"blk.{number}.", "blk.{layer}.", 1) if layer else gguf)
    return None if name is None else name.format(layer=number, expert="*")


def _named(gguf: str, whole: Stored) -> Iterator[tuple[str, Stored]]:
    """A tensor under its Hugging Face name, a stack of experts as one tensor each; an unknown one under its own."""
    name = hugging_face_name(gguf)
    if name is None:
        yield gguf, whole
    elif EVERY not in name or len(whole.shape) != 3 or whole.nbytes < LEAST_EXPERT * whole.shape[0]:
        yield name, whole
    else:
        count, size = whole.shape[0], whole.nbytes // whole.shape[0]
        for expert in range(count):
            yield (
                name.replace(EVERY, f".{expert}."),
                Stored(whole.shape[1:], whole.kind, whole.offset + expert * size),
            )


def _dequantised(raw: np.ndarray, kind: Kind, width: int) -> np.ndarray:
    """Rows of bytes [rows, bytes] as float32 [rows, width]."""
    values, step = np.empty((len(raw), width), np.float32), max(1, AT_ONCE // width)
    with np.errstate(all="ignore"):  # what a file's scales are is the figures' business
        for start in range(0, len(raw), step):
            values[start : start + step] = quants.dequantize(raw[start : start + step], kind)
    return values


def open_parts(path: Path) -> dict[str, GgufFile]:
    """A file by its name; of a split model (`…-00001-of-00003.gguf`) all parts. Raises `UserError` where one lacks."""
    first = GgufFile(path)
    count = first.metadata.get("split.count", 1)
    if count in (0, 1):
        return {path.name: first}
    named = re.fullmatch(r"(.+-)00001(-of-(\d{5})\.gguf)", path.name)
    if named is None or int(named[3]) != count:
        raise UserError(f"{path}: one of {brief(count)} parts of a model; give the first, as …-00001-of-0000N.gguf")
    parts = {path.name: first}
    for number in range(2, count + 1):
        part = GgufFile(path.with_name(f"{named[1]}{number:05d}{named[2]}"))
        if part.metadata.get("split.no") != number - 1 or part.metadata.get("split.count") != count:
            raise UserError(f"{part.path}: does not say that it is part {number} of {count}")
        parts[part.path.name] = part
    return parts
