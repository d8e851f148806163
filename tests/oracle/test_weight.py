"""One tensor as an engine unpacked it: the same, rounded, or why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import save_file

from jaxref.aprt import aprt_header, read_aprt
from oracle.unpacking import misreadings
from oracle.weight import Held, rounding
from oracle.weight_command import run_weight
from oracle.weight_told import print_weight, tell
from oracle.weight_tries import explained
from tests.commands import command, refused
from tests.oracle.standin.unpack import FAULTS, SIZES, unpack
from tests.oracle.test_unpacking import a_model, random_rows
from weights import EMBEDDED, Checkpoint, UserError, open_checkpoint

Q_PROJ, DOWN = "model.layers.2.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"


class Blocks:
    """A checkpoint of one tensor, of blocks of random bytes."""

    tensor_names = ("blocks",)

    def __init__(self, kind: str) -> None:
        self.kind, self.data = kind, random_rows(kind)
        self.values = quants.dequantize(self.data, GGMLQuantizationType[kind])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values.shape

    def stored_as(self, name: str) -> str:
        return self.kind

    def packed(self, name: str, rows: slice) -> np.ndarray:
        return self.data[rows]

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.values[start:stop]


@pytest.mark.parametrize("kind", SIZES)
def test_each_misreading_of_a_block_is_named(kind: str) -> None:
    blocks: Any = Blocks(kind)
    words = {row.name: f"blocks of {kind}: {row.words}" for row in misreadings(kind)}
    assert tell(Held(blocks, "blocks", unpack(kind, blocks.data))).left in ("none", "float32")
    for fault in FAULTS[kind]:
        told = tell(Held(blocks, "blocks", unpack(kind, blocks.data, fault)))
        assert told.left is None and told.apart.wrong, fault
        assert words[fault] in [fit.reading.words for fit in told.fits], fault
        assert len(told.fits) <= 3, fault


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_checkpoint(EMBEDDED)


def held(model: Checkpoint, name: str, values: np.ndarray, first: int = 0) -> Held:
    return Held(model, name, np.asarray(values, np.float32).reshape(-1, model.shape(name)[-1]), first)


def test_roundings_are_told_from_faults(model: Checkpoint) -> None:
    right = model.tensor(DOWN).astype(np.float32)
    near = right * np.float32(1 + 2.0**-23)
    for values, left in (
        (right, "none"),
        (near, "float32"),
        ((right * 1.0007).astype(np.float16), "float16"),
        ((right * 1.003).astype(ml_dtypes.bfloat16), "bfloat16"),
        (right * np.float32(1.01), None),
    ):
        assert tell(held(model, DOWN, values)).left == left
    one = right.copy()
    one[3, 5] = np.nan
    told = tell(held(model, DOWN, one))
    assert (told.left, told.apart.wrong, told.apart.wrong_rows, told.fits) == (None, 1, 1, [])
    assert told.apart.worst is not None and told.apart.worst[:2] == (3, 5)
    assert rounding(one, one) == "none"  # the checkpoint's own NaN


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_made_of_what_float32_rounded(model: Checkpoint, half: type) -> None:
    right = model.tensor(DOWN).astype(np.float64) * 1.003  # which neither type holds
    right[0, 1] = 1e-6 * np.abs(right[0]).max()  # where a scale's and a minimum's terms nearly cancel
    for off, left in ((2.0**-22, np.dtype(half).name), (2.0**-19, None)):
        values = right.copy()
        values[0, 1] += off * np.abs(right[0]).max()
        assert rounding(values.astype(half).astype(np.float64), right) == left


@pytest.mark.parametrize(
    ("name", "change", "hypothesis", "says"),
    [
        (DOWN, lambda w, m: w.T, "weight_transposed", "[in, out]"),
        (Q_PROJ, lambda w, m: w.reshape(6, 2, 8, -1).swapaxes(1, 2), "weight_permuted", "in turns"),
        (Q_PROJ, lambda w, m: w.reshape(6, 8, 2, -1).swapaxes(1, 2), "weight_permuted", "in halves"),
        (DOWN, lambda w, m: m.tensor(DOWN.replace("2", "1", 1)), "weight_neighbour", "it is model.layers.1."),
        (
            DOWN,
            lambda w, m: w.astype(ml_dtypes.bfloat16).view(np.float16),
            "weight_dtype",
            "bfloat16 values are read as",
        ),
        (DOWN, lambda w, m: 3 * w, "scaled", "3 times"),
        (DOWN, lambda w, m: 0 * w, "scaled", "all values are 0"),
        (DOWN, lambda w, m: w[::-1], "rows_moved", "row 0 is row "),
        ("model.norm.weight", lambda w, m: 1 + w, "norm_one_plus_w", "1 + w"),
    ],
)
def test_causes_have_the_names_of_explain(model: Checkpoint, name: str, change, hypothesis: str, says: str) -> None:
    values = np.asarray(change(model.tensor(name).astype(np.float32), model)).astype(np.float32)
    for stored in (values, values.astype(np.float16)):
        if not (hypothesis == "rows_moved" and stored.dtype == np.float16):  # rows are known by all their bits
            (fit,) = explained(held(model, name, stored))
            assert fit.reading.hypothesis == hypothesis and says in fit.reading.words


def put(path: Path, layer: int | None, values: np.ndarray) -> Path:
    path.write_bytes(aprt_header(layer, values.shape) + np.ascontiguousarray(values, "<f4").tobytes())
    return path


def asked(model: object, name: str, file: Path | None = None, **options: Any) -> int:
    """The command, in this process."""
    options = {"rows": None, "output": None, "json_wanted": False} | options
    return run_weight(str(model), name, file, **options)


def test_some_rows_are_enough(model: Checkpoint, tmp_path: Path) -> None:
    right = model.tensor(DOWN).astype(np.float32)
    first, some = put(tmp_path / "first.bin", 2, right[:3]), put(tmp_path / "some.bin", None, 2 * right[4:7])
    assert asked("tiny", DOWN, first) == 0
    done = command("weight", "tiny", DOWN, some, "--rows", "4..7", "--json", module="oracle")
    found = json.loads(done.stdout)
    assert (done.returncode, found["rows"], found["verdict"]) == (1, [4, 7], "differs")
    assert found["explanations"][0]["hypothesis"] == "scaled" and found["wrong_rows"] == 3
    assert found["worst"]["row"] in (4, 5, 6)


def test_the_right_values_are_written(model: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "weight.bin"
    assert asked("tiny", Q_PROJ, output=out, rows="5..9") == 0
    layer, values = read_aprt(out)
    np.testing.assert_array_equal(values, model.tensor(Q_PROJ, 5, 9).astype(np.float32).reshape(-1))
    assert layer == 2
    save_file({"w": model.tensor(Q_PROJ)}, tmp_path / "w.safetensors")  # in bfloat16
    assert asked("tiny", Q_PROJ, tmp_path / "w.safetensors") == 0


def test_one_of_several_is_found_by_its_name(model: Checkpoint, tmp_path: Path) -> None:
    several = {name: model.tensor(name).copy() for name in model.tensor_names}
    several[DOWN][3] *= -1
    save_file(several, tmp_path / "all.safetensors")
    assert asked("tiny", Q_PROJ, tmp_path / "all.safetensors") == 0
    assert asked("tiny", DOWN, tmp_path / "all.safetensors") == 1
    save_file({"blk.2.attn_q.weight": several[Q_PROJ], "x": several[DOWN]}, tmp_path / "two.safetensors")
    assert asked("tiny", "blk.2.attn_q.weight", tmp_path / "two.safetensors") == 0
    save_file(several | {"mask": np.ones(3, bool)}, tmp_path / "mask.safetensors")
    assert asked("tiny", Q_PROJ, tmp_path / "mask.safetensors") == 0
    with pytest.raises(UserError, match=r"none of its 2 tensors is called model\.layers\.2\.mlp\.down_proj"):
        asked("tiny", DOWN, tmp_path / "two.safetensors")
    np.save(tmp_path / "q.npy", several[Q_PROJ].astype(np.float32))
    assert asked("tiny", Q_PROJ, tmp_path / "q.npy") == 0
    np.savez(tmp_path / "q.npz", **{Q_PROJ: several[Q_PROJ].astype(np.float32)})
    assert asked("tiny", Q_PROJ, tmp_path / "q.npz") == 0
    np.savez(tmp_path / "q.npz", several[Q_PROJ].astype(np.float32))
    with pytest.raises(UserError, match=r"none of its 1 tensors is called .*; there is 'arr_0'"):
        asked("tiny", Q_PROJ, tmp_path / "q.npz")


def test_a_gguf_is_asked_by_its_own_names(tmp_path: Path, capsys) -> None:
    checkpoint = a_model(tmp_path / "model", "Q8_0", 1, "qwen3_moe")[1]
    path = checkpoint.folder
    expert = next(name for name in checkpoint.tensor_names if name.endswith(".experts.3.down_proj.weight"))
    layer = int(expert.split(".")[2])
    wrong = unpack("Q8_0", checkpoint.packed(expert, slice(None)), "unsigned")
    assert asked(path, expert, put(tmp_path / "e.bin", layer, checkpoint.tensor(expert))) == 0
    assert asked(path, expert, put(tmp_path / "f.bin", layer, wrong)) == 1
    said = capsys.readouterr().out
    assert "weight_unpacked: blocks of Q8_0: numbers are read as unsigned bytes" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    q = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight")
    assert asked(path, "blk.0.attn_q.weight", put(tmp_path / "q.bin", 0, q)) == 0
    stack = refused("weight", path, f"blk.{layer}.ffn_down_exps.weight", tmp_path / "e.bin", module="oracle")
    assert "a stack of experts; name one of them, like" in stack


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        (slice(None), [*range(32, 40), 288, 544, 800, 1056], "numbers 32-39 of each block of 256"),
        (slice(1, 3), [*range(256, 512)], "all numbers of block 1 of 256 in a row"),
        (slice(0, 1), [7, 1031], "number 7 of blocks 0, 4 of 256 in a row"),
        (slice(0, 1), [*range(0, 40, 2)], "numbers 0, 2, 4, 6, 8, 10, 12, 14, … of block 0 of 256 in a row"),
    ],
)
def test_what_places_in_a_block_are_wrong(capsys, rows: slice, columns: list[int], says: str) -> None:
    blocks: Any = Blocks("Q6_K")
    wrong = blocks.values.copy()
    wrong[rows, columns] += 1
    told = tell(Held(blocks, "blocks", wrong))
    assert np.flatnonzero(told.apart.places).tolist() == columns
    print_weight(told)
    said = " ".join(capsys.readouterr().out.split())
    assert f"where {says}; the others are right because no reading that is known has the engine's values" in said


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("model.layers.9.mlp.down_proj.weight", {"engine_file": "w.bin"}, "has no tensor"),
        (DOWN, {}, "nothing to do"),
        (DOWN, {"engine_file": "missing.bin"}, "missing.bin"),
        (DOWN, {"engine_file": "w.bin", "rows": "3..2"}, r"START\.\.END within 0\.\.72"),
        (DOWN, {"engine_file": "w.bin", "rows": "0..3"}, r"rows 0\.\.3 were expected"),
        (DOWN, {"engine_file": "odd.bin"}, "holds 7 values"),
        (DOWN, {"engine_file": "layer.bin"}, "its header says layer 1"),
        (DOWN, {"output": "notes.txt"}, "so it is not replaced"),
        (DOWN, {"engine_file": "w.bin", "output": "w.bin"}, "so it is not replaced"),
        (DOWN, {"engine_file": "missing.bin", "output": "new.bin"}, "missing.bin"),
        (DOWN, {"output": "new.bin", "json_wanted": True}, "--json tells of a comparison"),
    ],
)
def test_what_is_wrong_is_told(model: Checkpoint, tmp_path: Path, name: str, given: dict, says: str) -> None:
    width = model.shape(DOWN)[1]
    put(tmp_path / "w.bin", 2, np.zeros((2, width)))
    put(tmp_path / "odd.bin", 2, np.zeros(7))
    put(tmp_path / "layer.bin", 1, np.zeros((2, width)))
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = {key: tmp_path / value if key in ("engine_file", "output") else value for key, value in given.items()}
    with pytest.raises(UserError, match=says):
        asked("tiny", name, options.pop("engine_file", None), **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
