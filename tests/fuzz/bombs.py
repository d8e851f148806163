"""Small files that claim much: each must be refused, in little memory and at once."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from tests.fuzz.world import World

U64 = (1 << 64) - 1
DEEP = b"[" * 100_000 + b"]" * 100_000


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _head(tensors: int, entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


def _array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return _head(0, 1) + _string(b"k") + struct.pack("<IIQ", 9, kind, count) + rest


def _tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return _string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def gguf_bombs() -> dict[str, bytes]:
    """Counts, lengths and shapes that a file of a few bytes cannot hold."""
    stack = (1, 1, 1 << 18)
    found = {
        "tensors": _head(U64, 0),
        "tensors-negative": _head(1 << 63, 0),
        "entries": _head(0, U64),
        "string": _head(0, 1) + struct.pack("<Q", 1 << 63),
        "string-in-array": _array(8, 2, struct.pack("<QQ", 1 << 63, 0)),
        "strings": _array(8, U64, bytes(4096)),
        "strings-of-nothing": _array(8, 1 << 40, bytes(1 << 16)),
        "axes": _head(1, 0) + _string(b"t") + struct.pack("<I", 0xFFFFFFFF),
        "product": _head(1, 0) + _tensor(b"output.weight", (1 << 32, 1 << 32, 1 << 32, 1 << 32), 0, 0),
        "offset": _head(1, 0) + _tensor(b"output.weight", (32,), 0, U64),
        "alignment": _head(0, 1) + _string(b"general.alignment") + struct.pack("<IQ", 10, U64),
        "experts": _head(1, 0) + _tensor(b"blk.0.ffn_up_exps.weight", stack, 0, 0) + bytes(4 << 18),
        "many-stacks": _head(65, 0)
        + b"".join(_tensor(b"blk.%d.ffn_up_exps.weight" % i, (1, 1, 4096), 0, i << 14) for i in range(65))
        + bytes(66 << 14),
        "overlap": _head(2, 0) + b"".join(_tensor(n, (8,), 0, 0) for n in (b"a", b"b")) + bytes(128),
        "overlapping-stacks": _head(400, 0)
        + b"".join(_tensor(b"blk.%d.ffn_up_exps.weight" % i, (16, 1, 4096), 0, 0) for i in range(400))
        + bytes(1 << 19),
        "nested": _array(9, 1, struct.pack("<IQ", 9, 1) * 10_000),
        "one-type": _head(0, 1) + _string(b"k") + struct.pack("<I", 9) * 10_000,
        "numbers": _array(0, 1 << 20, bytes(1 << 20)),
    }
    return found | {f"array-{kind}": _array(kind, 1 << 61, bytes(64)) for kind in range(13)}


def two_names() -> bytes:
    """A whole header with the final norm under both of its names."""
    names = (b"output_norm.weight", b"model.norm.weight")
    return _head(2, 0) + b"".join(_tensor(name, (8,), 0, 32 * i) for i, name in enumerate(names)) + bytes(128)


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def safetensors_bombs() -> dict[str, bytes]:
    """Lengths, shapes and offsets that are none."""
    twice = b'{"a":%s,"a":%s}' % (json.dumps(_entry([1], 0, 4)).encode(), json.dumps(_entry([2], 0, 8)).encode())
    return {
        "empty": b"",
        "length": _safetensors({}, length=U64),
        "length-of-the-package's-limit": _safetensors({}, length=100_000_000),
        "product": _safetensors({"a": _entry([1 << 40, 1 << 40], 0, 4)}, bytes(4)),
        "product-zero": _safetensors({"a": _entry([0, 1 << 40, 1 << 40], 0, 0)}),
        "axes": _safetensors({"a": _entry([1] * 70, 0, 4)}, bytes(4)),
        "overlap": _safetensors({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, bytes(4)),
        "outside": _safetensors({"a": _entry([1], 0, 1 << 40)}, bytes(4)),
        "negative": _safetensors({"a": _entry([1], -4, 0)}, bytes(4)),
        "backwards": _safetensors({"a": _entry([1], 4, 0)}, bytes(4)),
        "hole": _safetensors({"a": _entry([1], 4, 8)}, bytes(8)),
        "deep": _safetensors(b'{"a":' + DEEP + b"}"),
        "twice": _safetensors(twice, bytes(8)),
        "list": _safetensors(b"[]"),
        "not-utf-8": _safetensors(b'{"\xff":1}'),
    }


def json_bombs() -> dict[str, bytes]:
    """JSON that no reader of ours takes, whatever it is about."""
    return {
        "empty": b"",
        "deep": DEEP,
        "deep-objects": b'{"a":' * 100_000,
        "deep-and-whole": b"[" * 500 + b"]" * 500,
        "digits": b'{"schema": ' + b"9" * 5000 + b"}",
        "nan": b'{"model_type": NaN}',
        "infinite": b'{"model_type": 1e999}',
        "half-a-character": b'{"model_type": "\\ud800"}',
        "not-utf-8": b'{"model_type": "\xff"}',
        "mark": b"\xef\xbb\xbf{}",
        "twice": b'{"model_type": "qwen2", "model_type": "qwen3"}',
        "list": b"[]",
        "string": b'"' + b"x" * 100_000 + b'"',
        "nothing": b"null",
        "many-lists": b"[" + b"[]," * 100_000 + b"[]]",
    }


def config_bombs(world: World) -> dict[str, bytes]:
    """Numbers in a config that would be loops and lists."""
    dense, moe = (json.loads((folder / "config.json").read_bytes()) for folder in (world.dense, world.moe))
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dense, {"num_hidden_layers": 10**9}),
        (dense, {"num_hidden_layers": 4096}),
        (dense, {"vocab_size": 10**400}),
        (dense, {"hidden_size": 1 << 40}),
        (dense, {"rms_norm_eps": 10**400}),
        (dense, {"rope_theta": 10**400}),
        (dense, {"layer_types": ["x" * 100_000] * 10}),
        (dense, {"x" * 100_000: 1}),
        (dense, {f"x{i}": 1 for i in range(10_000)}),
        (moe, {"num_experts": 10**9}),
        (moe, {"num_experts": 4096, "num_hidden_layers": 4096}),
        (moe, {"mlp_only_layers": [0] * 200_000}),
    ]
    return {f"config-{i}": json.dumps(raw | change).encode() for i, (raw, change) in enumerate(changes)}


def aprt_bombs() -> dict[str, bytes]:
    """Headers without values, and the other way round."""
    return {
        "empty": b"",
        "head": b"APRT" + struct.pack("<II", 0, 0xFFFFFFFF),
        "one-short": b"APRT" + struct.pack("<II", 3, 2) + bytes(7),
        "one-long": b"APRT" + struct.pack("<II", 3, 1) + bytes(8),
        "wraps": b"APRT" + struct.pack("<II", 3, 1 << 30) + bytes(4),
    }


def _npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def npy_bombs() -> dict[str, bytes]:
    """Shapes, types and lengths that are none."""
    of = "{'descr': %s, 'fortran_order': False, 'shape': %s}"
    return {
        "empty": b"",
        "magic": b"\x93NUMPY",
        "length": b"\x93NUMPY\x01\x00\xff\xff{",
        "length-of-version-2": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        "version": _npy(of % ("'<f4'", "(1,)"), bytes(4), 3),
        "product": _npy(of % ("'<f4'", "(1 << 60,)"), bytes(4)),
        "huge": _npy(of % ("'<f4'", f"({1 << 61}, {1 << 61})"), bytes(4)),
        "negative": _npy(of % ("'<f4'", "(-1, -1)"), bytes(4)),
        "true": _npy(of % ("'<f4'", "(True,)"), bytes(4)),
        "axes": _npy(of % ("'<f4'", str((1,) * 60)), bytes(4)),
        "one-short": _npy(of % ("'<f4'", "(2,)"), bytes(7)),
        "one-long": _npy(of % ("'<f4'", "(1,)"), bytes(8)),
        "nothing": _npy(of % ("'<f4'", "(0,)")),
        "object": _npy(of % ("'|O'", "(1,)"), b"cos\nsystem\n(S'true'\ntR."),
        "big-endian": _npy(of % ("'>f4'", "(1,)"), bytes(4)),
        "records": _npy(of % ("[('a', '<f4')]", "(1,)"), bytes(4)),
        "type": _npy(of % ("'<f4' * 99", "(1,)"), bytes(4)),
        "deep": _npy("(" * 9000),
        "deep-minus": _npy("-" * 9000),
        "by-columns": _npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2)}", bytes(16)),
    }


def _npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def npz_bombs() -> dict[str, bytes]:
    """Zips that are none, that grow as they are read, or whose members lie where others do."""
    of = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}"
    whole, large = _npy(of % 2, bytes(8)), _npy(of % (1 << 22), bytes(4 << 22))
    two = _npz(a=whole, b=whole)
    start = two.index(b"PK\x01\x02")  # of the list of members at the end, in which the second one is moved
    second = two.index(b"PK\x01\x02", start + 1)
    return {
        "empty": b"",
        "mark": b"PK\x03\x04",
        "end": b"PK\x05\x06" + b"\xff" * 18,
        "end-of-zip64": b"PK\x06\x06" + b"\xff" * 52 + b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + b"\xff" * 18,
        "compressed": _npz(zipfile.ZIP_DEFLATED, a=large),
        "one-short": _npz(a=whole[:-1]),
        "one-long": _npz(a=whole + b"x"),
        "claims-much": _npz(a=_npy(of % (1 << 60), bytes(8))),
        "object": _npz(a=_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n(S'true'\ntR.")),
        "same-place": two[: second + 42] + bytes(4) + two[second + 46 :],
        "nowhere": two[: second + 42] + b"\xfe\xff\xff\xff" + two[second + 46 :],
        "larger-than-the-file": two[: start + 20] + struct.pack("<II", 1 << 31, 1 << 31) + two[start + 28 :],
        "other-name": two.replace(b"b.npy", b"c.npy", 1),
    }


def bombs(world: World) -> Iterator[tuple[str, str, bytes]]:
    """(target, what, input)."""
    of_json = json_bombs()
    for target, inputs in {
        "aprt": aprt_bombs(),
        "safetensors": safetensors_bombs(),
        "npy": npy_bombs(),
        "npz": npz_bombs(),
        "gguf": gguf_bombs(),
        "index": of_json,
        "config": of_json | config_bombs(world),
        "tokenizer": of_json,
        "template": of_json,
        "manifest": of_json,
        "unfinished": of_json,
    }.items():
        yield from ((target, name, data) for name, data in inputs.items())
