"""What forward hooks on transformers' modules see, called as the modules are, is a tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from jaxref import make_tree
from jaxref.stages import STAGES
from oracle import assert_parity, compare
from oracle.explain import explain
from oracle.hf import load
from oracle.module_names import stages_of_modules as stages_in
from oracle.report import as_text
from oracle.told import sentence
from tests.conftest import prompt
from tests.test_engines_page import example
from weights import UserError, open_checkpoint

MODELS = ("qwen2", "qwen3", "moe")
TOKENS = prompt(23, 272)


def watched(folder: Path) -> dict[str, Any]:
    """What each module gives, by the hooks that docs/engines.md shows."""
    model, seen, page = load(folder), dict[str, Any](), dict[str, Any]()
    exec(example("python", "def watch"), page)
    page["watch"](model, seen)
    with torch.no_grad():
        model(input_ids=torch.tensor([TOKENS]))
    return seen


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, zoo) -> tuple[Path, dict[str, Any]]:
    return zoo(request.param), watched(zoo(request.param))


def test_every_module_is_compared(run) -> None:
    folder, seen = run
    result = compare(make_tree(folder, TOKENS, "float64"), seen)
    assert result.exit_code == 0, as_text(result)
    compared = {c.key[1] for c in result.comparisons}
    biased, has_experts = open_checkpoint(folder).config.qkv_bias, "model.layers.2.mlp.gate" in seen
    expected = {"embedding", "attn_norm", "attn_out", "ffn_norm", "post_ffn_residual", "final_norm", "lm_head"}
    expected |= {"qkv_bias"} if biased else {"qkv_matmul", "q_norm", "k_norm"}
    expected |= {"moe_ffn_out"} if has_experts else set()
    assert compared - {"ffn_gate", "ffn_up", "ffn_silu", "ffn_out"} == expected
    assert not any("no stages" in note for note in result.notes), result.notes
    assert any("read as a tree of what modules give" in note for note in result.notes)
    assert_parity(make_tree(folder, TOKENS, "float64"), seen)


def test_and_replayed(run) -> None:
    folder, seen = run
    told = explain(open_checkpoint(folder), seen, TOKENS)
    assert told.found.verdict == "clean" and not told.found.unknown, sentence(told)


def test_a_fault_between_modules_is_named(zoo, tmp_path: Path) -> None:
    """RoPE is no module: it shows where the attention's output is."""
    for path in zoo("qwen2").iterdir():
        (tmp_path / path.name).symlink_to(path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters", None)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 1000000.0}))
    told = explain(open_checkpoint(zoo("qwen2")), watched(tmp_path), TOKENS)
    causes = {cause.stage: cause.explanation for cause in told.causes}
    assert causes.keys() == {"attn_out"}, sentence(told)
    assert causes["attn_out"] is not None
    assert (causes["attn_out"].hypothesis, causes["attn_out"].parameter) == ("rope_theta", 1000000.0)


def test_a_file_of_them(run, tmp_path: Path) -> None:
    folder, seen = run
    tensors = {name: x.contiguous().clone() for name, x in seen.items() if isinstance(x, torch.Tensor)}
    save_file(tensors, tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", **{name: x.numpy() for name, x in tensors.items()})
    ours = compare(make_tree(folder, TOKENS, "float64"), seen)
    for path in (tmp_path / "t.safetensors", tmp_path / "t.npz"):
        found = compare(make_tree(folder, TOKENS, "float64"), path)
        assert [(c.key, c.test) for c in found.comparisons] == [(c.key, c.test) for c in ours.comparisons]


def stages_of_modules(names: list[str]) -> dict:
    return stages_in(names, Path("t"))[0]


def test_which_module_gives_which_stage() -> None:
    layer = "model.layers.3."
    packed = [f"{layer}self_attn.{name}_proj" for name in ("v", "k", "q")]
    assert stages_of_modules(packed) == {(3, "qkv_bias"): packed[::-1]}
    assert stages_of_modules(packed[:2]) == {}  # without q they are no stage
    assert stages_of_modules([*packed, f"{layer}self_attn.q_norm"])[3, "qkv_matmul"] == packed[::-1]
    joined = f"{layer}self_attn.qkv_proj"
    assert stages_of_modules([*packed, joined]) == {(3, "qkv_bias"): packed[::-1]}
    assert stages_of_modules([*packed[1:], joined]) == {(3, "qkv_bias"): [joined]}
    assert stages_of_modules([f"{layer}self_attn.qkv_proj"]) == {(3, "qkv_bias"): [f"{layer}self_attn.qkv_proj"]}
    assert stages_of_modules(["layers.0", "norm", "lm_head", "embed_tokens", "model.layers.0.mlp"]) == {
        (0, "post_ffn_residual"): ["layers.0"],
        (0, "ffn_out"): ["model.layers.0.mlp"],
        (None, "final_norm"): ["norm"],
        (None, "lm_head"): ["lm_head"],
        (0, "embedding"): ["embed_tokens"],
    }
    both = [f"{layer}mlp", f"{layer}mlp.down_proj"]
    assert stages_of_modules(both) == {(3, "ffn_out"): both[1:]}
    assert stages_of_modules([f"{layer}mlp", f"{layer}mlp.gate"]) == {(3, "moe_ffn_out"): [f"{layer}mlp"]}
    # A model's parameters, and what is called so by its stage.
    assert stages_of_modules([f"{layer}input_layernorm.weight", "model.norm.weight", "lm_head"]) == {}
    with pytest.raises(UserError, match=r"t: .* are the same module"):
        stages_of_modules(["layers.0", "model.layers.0"])
    unseen = stages_in(["layers.0"], Path("t"))[1]
    assert {"q_post_rope", "attention", "ffn_swigl", "moe_router"} < unseen < set(STAGES)
    assert not unseen & {"ffn_silu", "ffn_gate", "post_ffn_residual", "qkv_bias", "lm_head"}


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_an_engine_like_vllm(zoo, name: str) -> None:
    """Two projections joined, act_fn that multiplies, layers that give what their feed-forward gave."""
    truth, seen = make_tree(zoo(name), TOKENS, "float64", positions="all"), dict[str, Any]()
    for n in range(open_checkpoint(zoo(name)).config.num_hidden_layers):
        layer = truth[f"layer-{n}"]
        packed = np.asarray(layer["qkv_bias" if "qkv_bias" in layer else "qkv_matmul"])
        norms = {f"self_attn.{x}": layer[x] for x in ("q_norm", "k_norm") if x in layer}
        both = np.concatenate([layer["ffn_gate"], layer["ffn_up"]], axis=-1)
        gives = {"input_layernorm": layer["attn_norm"], "self_attn.qkv_proj": packed, "self_attn": layer["attn_out"]}
        gives |= {**norms, "self_attn.attn": layer["attention"], "self_attn.o_proj": layer["attn_out"]}
        gives |= {"post_attention_layernorm": layer["ffn_norm"], "mlp.gate_up_proj": both, "": layer["ffn_out"]}
        gives |= {"mlp.act_fn": layer["ffn_swigl"], "mlp.down_proj": layer["ffn_out"], "mlp": layer["ffn_out"]}
        seen |= {f"model.layers.{n}.{module}".rstrip("."): np.float32(x) for module, x in gives.items()}
    around = {"model.embed_tokens": truth["layer-0"]["embedding"], "model.norm": truth["final_norm"]}
    seen |= {module: np.float32(x) for module, x in around.items()} | {"lm_head": np.float32(truth["lm_head"])}
    result = compare(truth, seen)
    assert result.exit_code == 0, as_text(result)
    compared = {c.key[1] for c in result.comparisons}
    assert {"attention", "ffn_swigl", "ffn_out"} < compared and not compared & {"ffn_silu", "post_ffn_residual"}
    told = explain(open_checkpoint(zoo(name)), seen, TOKENS)
    assert told.found.verdict == "clean" and not told.found.unknown, sentence(told)


def test_stages_may_stand_beside_modules(run) -> None:
    folder, seen = run
    truth = make_tree(folder, TOKENS, "float64")
    own = {f"layer-{n}/attn_softmax": truth[f"layer-{n}"]["attn_softmax"] for n in range(3)}
    result = compare(truth, own | seen)
    assert result.exit_code == 0
    assert sum(c.key[1] == "attn_softmax" for c in result.comparisons) == 3


def test_a_stray_name_excuses_no_stage(zoo, tmp_path: Path) -> None:
    """What is called like a module beside stages that have their own names, a cache or a mask."""
    truth = make_tree(zoo("qwen2"), TOKENS, "float64", positions="all")
    layers = [name for name in truth if name.startswith("layer-")]
    own = {f"{layer}/{stage}": np.float32(x) for layer in layers for stage, x in truth[layer].items()}
    own |= {name: np.float32(truth[name]) for name in ("final_norm", "lm_head")}
    lost = own.pop("layer-1/q_post_rope")
    result = compare(truth, own | {"layers.0": np.arange(3)})
    assert result.exit_code == 2, as_text(result)
    save_arrays(own | {"layer-1/q_post_rope": lost, "norm": np.ones(3, bool)}, tmp_path / "t.safetensors")
    assert compare(truth, tmp_path / "t.safetensors").exit_code == 0


def test_parts_that_do_not_fit_are_one_line(run) -> None:
    folder, seen = run
    name = "model.layers.1.self_attn.k_proj"
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj: what makes qkv_.* has other rows"):
        compare(make_tree(folder, TOKENS, "float64"), seen | {name: seen[name][:, 1:]})
