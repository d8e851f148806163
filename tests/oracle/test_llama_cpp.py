"""llama.cpp in this process: its stages are jaxref's on the same file, and faults of its own settings are found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxref
from jaxref.dump import Job, Report
from jaxref.precision import numerics_of
from jaxref.selection import Selection, parse_positions, parse_stages
from oracle import assert_parity, compare
from oracle.engines import llama_api, llama_cpp
from oracle.engines.llama_dump import dump_llama_cpp
from oracle.report import as_text
from tests.conftest import YARN, prompt
from tests.gguf_writer import tokens as vocabulary
from tests.gguf_writer import write_gguf
from tests.trees import distance, flat, write_tree
from weights import UserError, open_checkpoint
from weights.tiny import tiny_config, write_random

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs llama.cpp: pip install 'jaxref[llama-cpp]'", allow_module_level=True)

BOUND = 2e-6
# llama.cpp takes H·h = hidden_size for granted in qwen2, and experts in every layer.
MODELS = {
    "qwen2": ("qwen2", {"hidden_size": 96}),
    "qwen2-tied": ("qwen2", {"hidden_size": 96, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"hidden_size": 96, "rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "qwen3moe-64": ("qwen3_moe", {"mlp_only_layers": [], "num_experts": 64, "num_experts_per_tok": 8}),
    "qwen3moe-one": ("qwen3_moe", {"mlp_only_layers": [], "num_experts_per_tok": 1}),
}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory):
    """A function from a name of `MODELS` to its GGUF file in float32, made at first use."""
    root = tmp_path_factory.mktemp("gguf")

    def file(name: str) -> Path:
        path = root / f"{name}.gguf"
        if not path.exists():
            arch, changes = MODELS[name]
            write_random(root / name, tiny_config(arch, None, 3, **changes, rope_theta=1e6), dtype="float32")
            # llama.cpp wants at least one merge, which our tiny vocabulary has not.
            names = vocabulary(root / name)["tokenizer.ggml.tokens"]
            merged = {"tokenizer.ggml.tokens": [*names[:-1], "ab"], "tokenizer.ggml.merges": ["a b"]}
            write_gguf(root / name, path, changes=merged)
        return path

    return file


def capture(path: Path, tokens: list[int], **options) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The stages by their paths in a tree, and the logits [S, V]."""
    trace: dict[str, np.ndarray] = {}

    def keep(layer: int | None, stage: str, value: np.ndarray) -> None:
        key = stage if layer is None else f"layer-{layer}/{stage}"
        assert key not in trace
        trace[key] = value

    return trace, llama_cpp.run(path, tokens, keep, **options)


def dump(
    path: Path,
    output: Path,
    tokens: list[int],
    stages: str = "all",
    device: str = "cpu",
    positions: str | None = None,
    **knobs,
) -> Report:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    layers = tuple(range(config.num_hidden_layers))
    rows = parse_positions(positions, len(tokens))
    selection = Selection(config, len(tokens), parse_stages(stages, config), layers, rows)
    job = Job(checkpoint, tokens, selection, numerics_of("float32"), output)
    return dump_llama_cpp(job, device, lambda layer: None, **knobs)


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("name", MODELS)
def test_every_stage_is_jaxrefs(gguf, name: str, count: int) -> None:
    checkpoint, tokens = open_checkpoint(gguf(name)), prompt(count, 272)
    theirs, logits = capture(gguf(name), tokens)
    ours = flat(jaxref.forward(checkpoint.params(), np.array(tokens), checkpoint.config))
    assert {key.split("/")[-1] for key in ours.keys() - theirs.keys()} <= set(llama_cpp.MISSING)
    assert theirs.keys() <= ours.keys()
    for key, value in theirs.items():
        assert value.shape == ours[key].shape, key
        assert value.dtype == ours[key].dtype, key
        assert np.array_equal(value, ours[key]) or distance(value, ours[key]) <= BOUND, key
    assert np.array_equal(logits, theirs["lm_head"])


@pytest.mark.parametrize("name", ["qwen2", "qwen3moe"])
def test_watching_keeps_the_bits_of_the_logits(gguf, name: str) -> None:
    tokens = prompt(40, 272)
    seen = capture(gguf(name), tokens)[1]
    assert np.array_equal(seen, llama_cpp.run(gguf(name), tokens, None))
    assert np.array_equal(seen, llama_cpp.run(gguf(name), tokens, None, threads=1))


@pytest.mark.parametrize(
    ("knobs", "first"),
    [
        ({"rope_freq_base": 10000.0}, "q_post_rope"),
        ({"rope_freq_scale": 0.5}, "q_post_rope"),
        ({"attention_type": 1}, "attn_softmax"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_wrong_setting_is_named_by_its_first_stage(gguf, tmp_path: Path, name: str, knobs: dict, first: str) -> None:
    tokens = prompt(23, 272)
    write_tree(gguf(name), tmp_path / "ours", tokens)
    dump(gguf(name), tmp_path / "clean", tokens)
    dump(gguf(name), tmp_path / "fault", tokens, **knobs)
    assert_parity(tmp_path / "ours", tmp_path / "clean", allow_missing=["ffn_silu"])
    result = compare(tmp_path / "ours", tmp_path / "fault")
    assert result.first is not None and result.first.key == (0, first), as_text(result)


def test_the_plan_is_what_is_written(gguf, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "oracle", "llama-cpp", gguf("qwen2"), "--tokens", "1,2", "--output", tmp_path / "t"]
    plan, done = (
        json.loads(subprocess.run([*words, "--json", *more], capture_output=True, text=True, check=True).stdout)
        for more in (["--plan"], [])
    )
    assert "ffn_silu" not in {row["stage"] for row in plan["stages"]}
    assert sum(row["files"] for row in plan["stages"]) == done["files"]


def test_the_tree_says_what_is_missing(gguf, tmp_path: Path) -> None:
    report = dump(gguf("qwen2"), tmp_path / "tree", prompt(7, 272), "ffn_gate,ffn_silu,lm_head")
    manifest = json.loads(report.manifest.read_text())
    assert (manifest["producer"], manifest["missing"], manifest["dtype"]) == ("llama.cpp", ["ffn_silu"], "float32")
    assert manifest["versions"]["xllamacpp"] == llama_api.VERSION
    assert [file["path"] for file in manifest["files"]] == [
        *(f"layer-{i}/ffn_gate.bin" for i in range(3)),
        "lm_head.bin",
    ]
    assert report.logits is not None and report.logits.shape == (272,)
    with pytest.raises(UserError, match=r"llama\.cpp does not show ffn_silu"):
        dump(gguf("qwen2"), tmp_path / "none", prompt(7, 272), "ffn_silu")
    with pytest.raises(UserError, match="--device cuda"):
        dump(gguf("qwen2"), tmp_path / "none", prompt(7, 272), device="cuda")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_what_the_receiver_raises_stops_the_run(gguf, raised: type[BaseException]) -> None:
    seen: list[str] = []

    def emit(layer: int | None, stage: str, value: np.ndarray) -> None:
        seen.append(stage)
        if stage == "attn_softmax":
            raise raised("enough")

    with pytest.raises(raised, match="enough"):
        llama_cpp.run(gguf("qwen2"), [1, 2, 3], emit)
    assert seen[-1] == "attn_softmax"
    assert len(capture(gguf("qwen2"), [1, 2, 3])[0]) > 50


def test_bad_input_is_one_line(gguf, tmp_path: Path, capfd) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf("qwen2").read_bytes()[:-5000])
    for path, tokens, knobs, says in (
        (broken, [1], {}, "llama.cpp cannot load it: .*"),
        (tmp_path / "none.gguf", [1], {}, "llama.cpp cannot load it: .*"),
        (gguf("qwen2"), [], {}, "tokens must be one or more ids from 0 to 271"),
        (gguf("qwen2"), [272], {}, "tokens must be one or more ids from 0 to 271"),
        (gguf("qwen2"), [1], {"rope_scale": 2.0}, "no knob rope_scale here"),
    ):
        with pytest.raises(UserError, match=says) as error:
            llama_cpp.run(path, tokens, None, **knobs)
        assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def unloaded():
    """The library as if it were loaded for the first time, and forgotten afterwards."""
    llama_api.load.cache_clear()
    yield
    llama_api.load.cache_clear()


def test_an_absent_library_is_named(unloaded, monkeypatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"not installed: pip install 'jaxref\[llama-cpp\]'"):
        llama_api.load()


def test_another_version_is_refused(unloaded, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2025.1.0")
    with pytest.raises(UserError, match=r"xllamacpp 2025\.1\.0 is installed; only 2026"):
        llama_api.load()


@pytest.mark.parametrize(("field", "value"), [("n_batch", 512), ("type_v", 0), ("swa_full", False)])
def test_another_layout_is_refused(unloaded, monkeypatch, field: str, value: object) -> None:
    name = "llama_context_default_params"
    kind, known = llama_api.DEFAULTS[name]
    monkeypatch.setitem(llama_api.DEFAULTS, name, (kind, known | {field: value}))
    with pytest.raises(UserError, match=rf"another build than the one this reads: {name}: {field} is"):
        llama_api.load()
