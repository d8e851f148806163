"""`oracle weight MODEL all FILE`: every tensor that an engine loaded, beside the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM

from oracle import assert_weights
from oracle.weight_command import run_weight
from oracle.weight_parts import FUSED
from tests.commands import command, refused
from tests.oracle.standin.unpack import unpack
from tests.oracle.test_unpacking import a_model
from weights import EMBEDDED, Checkpoint, UserError, open_checkpoint

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_checkpoint(EMBEDDED)


def loaded(model: Checkpoint) -> dict[str, np.ndarray]:
    return {name: model.tensor(name).astype(np.float32) for name in model.tensor_names}


def judged(model: str | Path, tensors: dict[str, np.ndarray], path: Path, *, as_json: bool = False) -> int:
    save_file(tensors, path)
    return run_weight(str(model), "all", path, None, None, json_wanted=as_json)


def test_all_are_the_same(model: Checkpoint, tmp_path: Path, capsys) -> None:
    assert judged("tiny", loaded(model), tmp_path / "w.safetensors") == 0
    count = len(model.tensor_names)
    assert capsys.readouterr().out == f"0 differ, 0 missing; {count} the same values\n"
    halves = {name: x.astype(np.float16) for name, x in loaded(model).items()}  # of bfloat16: small values lose bits
    assert judged("tiny", halves, tmp_path / "h.safetensors") == 0


def test_what_differs_is_told_by_its_cause(model: Checkpoint, tmp_path: Path, capsys) -> None:
    tensors = loaded(model)
    for layer in (0, 2):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T.reshape(tensors[name].shape))
    tensors["model.layers.1.mlp.down_proj.weight"][5] = 0
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    tensors["extra"] = np.ones(3, np.float32)
    del tensors["model.layers.1.input_layernorm.weight"]
    assert judged("tiny", tensors, tmp_path / "w.safetensors") == 1
    said = " ".join(capsys.readouterr().out.split())
    stored, count = model.stored_as(DOWN), len(tensors) - 2
    assert f"differ: 2 of {count} in {stored}; relative L2" in said
    assert "tensors model.layers.*.mlp.down_proj.weight, layers 0, 2 because" in said
    assert "transposed" in said and "because no reading that is known has the engine's values" in said
    assert "another size: model.norm.weight [3], where MODEL has [72]" in said
    assert "not in MODEL: 1, 'extra'" in said
    assert "not in the file: 1, first model.layers.1.input_layernorm.weight" in said
    assert said.endswith(f"4 differ, 1 missing; {count - 3} the same values")


def as_engines_have_them(model: Checkpoint, gate_up: str, down: str) -> dict[str, np.ndarray]:
    """q, k and v one below the other, gate and up too; of experts all in one, called so."""
    found = loaded(model)
    for name in list(found):
        for fused, parts in FUSED.items():
            if parts[0] in name:
                names = [name.replace(parts[0], part) for part in parts]
                found[name.replace(parts[0], fused)] = np.concatenate([found.pop(each) for each in names])
    for layer in filter(model.config.is_moe, range(model.config.num_hidden_layers)):
        start = f"model.layers.{layer}.mlp.experts."
        experts = [[found.pop(f"{start}{e}.{part}.weight") for part in ("gate_proj", "up_proj")] for e in range(8)]
        found[start + gate_up] = np.stack([np.concatenate(each) for each in experts])
        found[start + down] = np.stack([found.pop(f"{start}{e}.down_proj.weight") for e in range(8)])
    return found


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("w13_weight", "w2_weight")], ids="-".join)
def test_several_in_one(zoo, tmp_path: Path, capsys, names: tuple[str, str]) -> None:
    checkpoint = open_checkpoint(zoo("moe"))
    tensors = as_engines_have_them(checkpoint, *names)
    assert len(tensors) < len(checkpoint.tensor_names) / 2
    assert judged(zoo("moe"), tensors, tmp_path / "w.safetensors") == 0
    assert f"0 differ, 0 missing; {len(checkpoint.tensor_names)} the same values" in capsys.readouterr().out
    config, inner = checkpoint.config, tensors[f"model.layers.2.mlp.experts.{names[0]}"].shape[1] // 2
    fused, stacked = "model.layers.1.self_attn.qkv_proj.weight", f"model.layers.2.mlp.experts.{names[0]}"
    tensors[fused][config.q_width] += 1  # the first row of k
    tensors[stacked][5, inner:] *= -1
    tensors["model.layers.1.mlp.gate_up_proj.weight"] = np.ones((3, config.hidden_size), np.float32)
    assert judged(zoo("moe"), tensors, tmp_path / "w.safetensors") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "model.layers.*.self_attn.k_proj.weight, layers 1" in said or "self_attn.k_proj.weight" in said
    assert "experts.5.up_proj.weight" in said and "q_proj" not in said and "gate_proj" not in said.split("missing")[0]
    assert f"another size: model.layers.1.mlp.gate_up_proj.weight [3, {config.hidden_size}]" in said
    tensors = {name: x[:, :-1] if name.endswith(names) else x for name, x in tensors.items()}
    assert judged(zoo("moe"), tensors, tmp_path / "w.safetensors") == 1
    said = capsys.readouterr().out
    wrong = 2 * 8 * sum(map(config.is_moe, range(config.num_hidden_layers))) + 1
    assert said.count("another size: ") == 9 and f"another size: {wrong - 8} more" in said


def test_in_python_a_dictionary_will_do(zoo, tmp_path: Path) -> None:
    """Of torch too, with what is no weight beside it; what is wrong is an AssertionError with the report."""
    checkpoint = open_checkpoint(zoo("moe"))
    tensors = {name: torch.from_numpy(x).bfloat16() for name, x in loaded(checkpoint).items()}
    tensors |= {"mask": torch.ones(3, dtype=torch.bool), "rotary_emb.inv_freq": torch.ones(3)}
    found = assert_weights(checkpoint, tensors)
    assert found.same["bfloat16"] + found.same["none"] == len(checkpoint.tensor_names) and len(found.unknown) == 2
    save_torch(tensors, tmp_path / "w.safetensors")
    assert assert_weights(zoo("moe"), tmp_path / "w.safetensors").same == found.same
    down = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(AssertionError, match="transposed"):
        assert_weights(checkpoint, tensors | {down: tensors[down].T.reshape(tensors[down].shape)})
    with pytest.raises(AssertionError, match=f"not in the file: 1, first {down}"):
        assert_weights(checkpoint, {name: x for name, x in tensors.items() if name != down})
    with pytest.raises(UserError, match="tensors: no name in it is a tensor's of"):
        assert_weights(checkpoint, {"x": np.ones(3)})
    with pytest.raises(UserError, match="floats or integers were expected"):
        assert_weights(checkpoint, {down: np.ones(3, bool)})


def test_hugging_faces_own_modules_hold_them(zoo) -> None:
    for name in ("qwen2-tied", "moe"):
        theirs = AutoModelForCausalLM.from_pretrained(zoo(name), dtype=torch.float32)
        assert not assert_weights(zoo(name), theirs.state_dict()).unknown


def test_what_is_missing_is_no_success(model: Checkpoint, tmp_path: Path, capsys) -> None:
    tensors = loaded(model)
    del tensors[DOWN]
    assert judged("tiny", tensors, tmp_path / "w.safetensors", as_json=True) == 2
    *rows, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert {row["tensor"] for row in rows} == set(tensors) and {row["verdict"] for row in rows} == {"same"}
    assert summary["missing"] == [DOWN] and summary["same"]["none"] == len(tensors) and summary["differ"] == 0


def test_stacks_of_experts_and_the_names_of_gguf(tmp_path: Path, capsys) -> None:
    checkpoint = a_model(tmp_path / "model", "Q8_0", 1, "qwen3_moe")[1]
    names = list(checkpoint.tensor_names)
    experts = [name for name in names if name.endswith("experts.3.down_proj.weight")]
    tensors = {name: np.asarray(checkpoint.tensor(name)) for name in names}
    for one in experts:
        layer, stack = one.split(".")[2], one.split("experts.3.")
        inside = [name for name in names if name.startswith(stack[0]) and name.endswith(stack[1])]
        inside.sort(key=lambda name: int(name.split("experts.")[1].split(".")[0]))
        tensors[f"blk.{layer}.ffn_down_exps.weight"] = np.stack([tensors.pop(name) for name in inside])
    assert judged(checkpoint.folder, tensors, tmp_path / "w.safetensors") == 0, capsys.readouterr().out
    more = {name: np.concatenate([x, x[:1]]) for name, x in tensors.items() if x.ndim == 3}
    assert judged(checkpoint.folder, tensors | more, tmp_path / "more.safetensors") == 0
    count = len(next(iter(more.values()))) - 1
    assert f"not in MODEL: {len(more)}, '{min(more)}[{count}]'" in " ".join(capsys.readouterr().out.split())
    wrong = unpack("Q8_0", checkpoint.packed(experts[0], slice(None)), "unsigned")
    tensors[f"blk.{experts[0].split('.')[2]}.ffn_down_exps.weight"][3] = wrong
    assert judged(checkpoint.folder, tensors, tmp_path / "w.safetensors") == 1
    layer = experts[0].split(".")[2]
    alike, said = experts[0].replace(f".{layer}.", ".*.", 1), " ".join(capsys.readouterr().out.split())
    assert (
        f"tensors {alike}, layer {layer} because weight_unpacked: blocks of Q8_0: numbers are read as unsigned bytes"
        in said
    )


def test_the_head_may_have_its_own_name_where_it_is_the_embedding(zoo, tmp_path: Path) -> None:
    tied = open_checkpoint(zoo("qwen2-tied"))
    tensors = loaded(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert judged(zoo("qwen2-tied"), tensors, tmp_path / "w.safetensors") == 0
    tensors["lm_head.weight"][7] *= 2
    assert judged(zoo("qwen2-tied"), tensors, tmp_path / "w.safetensors") == 1


def test_what_cannot_be_is_one_line(model: Checkpoint, tmp_path: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "w.bin").touch()
    for words, more in (
        ("no name in it is a tensor's of", [tmp_path / "a.safetensors"]),
        ("one file, .safetensors or .npz", [tmp_path / "w.bin"]),
        ("nothing to do", []),
    ):
        assert words in refused("weight", "tiny", "all", *more, module="oracle")
    with pytest.raises(UserError, match="neither --rows nor --output"):
        run_weight("tiny", "all", tmp_path / "a.safetensors", "0..1", None, json_wanted=False)


def test_the_command(model: Checkpoint, tmp_path: Path) -> None:
    tensors = loaded(model)
    tensors[DOWN] *= np.float32(1.5)
    save_file(tensors, tmp_path / "w.safetensors")
    done = command("weight", "tiny", "all", tmp_path / "w.safetensors", module="oracle")
    assert (done.returncode, done.stderr) == (1, "")
    assert "because   scaled" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
