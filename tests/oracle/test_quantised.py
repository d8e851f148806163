"""Quantised engines: llama.cpp's rounding of activations is known; a clean engine agrees and a fault does not."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from jaxref.activations import activation_of, coarsest_activation, round_activations
from oracle import assert_parity, compare
from oracle.engines import llama_api
from oracle.explain import explain
from oracle.localize import localize
from oracle.report import as_text
from tests.conftest import prompt
from tests.gguf_writer import encoded_by_ggml, write_gguf
from tests.gguf_writer import tokens as vocabulary
from tests.oracle.test_llama_cpp import capture, dump
from tests.trees import distance, write_tree
from weights import EMBEDDED, Checkpoint, UserError, open_checkpoint
from weights.gguf_file import QUANTISED
from weights.tiny import tiny_config, write_random

HAS_LLAMA = importlib.util.find_spec("xllamacpp") is not None
needs_llama = pytest.mark.skipif(not HAS_LLAMA, reason="needs llama.cpp: pip install 'jaxref[llama-cpp]'")
# Two kv heads of three query heads, and rows that blocks of 256 divide.
MID = {
    "hidden_size": 768,
    "intermediate_size": 1536,
    "num_attention_heads": 6,
    "head_dim": 128,
    "rope_theta": 1e6,
}
MOE = {"moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4, "mlp_only_layers": []}
TOKENS = prompt(40, 272)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("gguf")

    def file(arch: str, kind: str, layer: int | None = None) -> Path:
        """All layers are stored as `kind`, or one alone and the others as F16: ggml takes 15 s for three of IQ2_S."""
        path = root / f"{arch}-{kind}-{layer}.gguf"
        if not path.exists():
            folder = root / arch
            if not folder.exists():
                write_random(folder, tiny_config(arch, None, 3, **MID, **(MOE if "moe" in arch else {})))
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(EMBEDDED / name, folder)
            names = vocabulary(folder)["tokenizer.ggml.tokens"]
            merged = {"tokenizer.ggml.tokens": [*names[:-1], "ab"], "tokenizer.ggml.merges": ["a b"]}
            stored = kind if layer is None else lambda name: kind if name.startswith(f"blk.{layer}.") else "F16"
            write_gguf(folder, path, stored, merged, encode=encoded_by_ggml if HAS_LLAMA else None)
        return path

    return file


@pytest.mark.parametrize("count", [32, 100, 512])
def test_q8_0_is_the_packages_own(count: int) -> None:
    x = np.random.default_rng(count).standard_normal((5, count)).astype(np.float32)
    x[2] = 0
    padded = np.pad(x, [(0, 0), (0, -count % 32)])
    theirs = quants.dequantize(quants.quantize(padded, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    ours = np.asarray(round_activations(jnp.asarray(x), "Q8_0"))
    assert ours.shape == x.shape
    # There 1/d is rounded on the way, which decides halves otherwise: a step of the grid, for few.
    assert distance(ours, theirs[:, :count]) < 2e-4


def test_q8_k_keeps_the_greatest_value_and_is_a_grid_of_127_steps() -> None:
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    ours = np.asarray(round_activations(jnp.asarray(x), "Q8_K"))
    for row, found in zip(x.reshape(-1, 256), ours.reshape(-1, 256), strict=True):
        step = np.abs(row).max() / 127
        assert np.abs(found).max() == pytest.approx(np.abs(row).max(), rel=1e-6)
        assert np.abs(found - row).max() <= step * 0.51
        assert np.abs(found / step - np.rint(found / step)).max() < 1e-3


def test_half_precision_activations() -> None:
    x = np.array([[1.0009765, 3.14159265, 70000.0]], np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            round_activations(jnp.asarray(x), "float16"), x.astype(np.float16).astype(np.float32)
        )
    np.testing.assert_array_equal(
        round_activations(jnp.asarray(x), "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_what_a_file_asks_for(gguf, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf("qwen2", "Q4_K"))
    assert activation_of(checkpoint, "model.layers.0.mlp.up_proj.weight") == "Q8_K"
    assert activation_of(checkpoint, "model.norm.weight") is None
    assert coarsest_activation(checkpoint) == "q8"
    assert coarsest_activation(open_checkpoint(gguf("qwen2", "F16"))) == "float16"
    assert coarsest_activation(open_checkpoint(gguf("qwen2", "F32"))) == "float32"


@needs_llama
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "F16"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_clean_engine_agrees(gguf, tmp_path: Path, arch: str, kind: str) -> None:
    file = gguf(arch, kind)
    write_tree(file, tmp_path / "truth", TOKENS, dtype="float64", positions="all")
    write_tree(file, tmp_path / "stored", TOKENS, positions="all", as_stored=True)
    dump(file, tmp_path / "engine", TOKENS, positions="all")
    stated = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert stated["activations"] == ("float16" if kind == "F16" else "q8")
    assert_parity(tmp_path / "truth", tmp_path / "engine")
    result = assert_parity(tmp_path / "truth", tmp_path / "engine", hf=tmp_path / "stored")
    assert result.blame.who == "none"


@needs_llama
@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_the_numbers_are_ggmls_own(kind: GGMLQuantizationType) -> None:
    """To the bit, whatever bytes a block has."""
    count, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(size).integers(0, 256, (500, size), dtype=np.uint8)
    theirs = np.empty((500, count), np.float32)
    with np.errstate(all="ignore"):  # some scales are infinite
        ours = quants.dequantize(blocks, kind)
    dequantize = getattr(llama_api.load(), f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    dequantize.argtypes, dequantize.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    dequantize(blocks.ctypes.data, theirs.ctypes.data, theirs.size)
    assert np.isfinite(theirs).mean() > 0.9
    np.testing.assert_array_equal(theirs, ours)
    np.testing.assert_array_equal(np.signbit(theirs[theirs == 0]), np.signbit(ours[ours == 0]))


def sums_in_half(x: np.ndarray, checkpoint: Checkpoint, names: list[str]) -> np.ndarray:
    """What Q4_1 and Q5_1 add to a product: their least values times the float16 rounding of sums of 32 activations."""
    blocks = x.reshape(len(x), -1, 32)
    greatest = np.abs(blocks).max(axis=-1, keepdims=True)
    step = greatest / np.float32(127)
    whole = np.rint(blocks * (np.float32(127) / greatest)).sum(axis=-1, dtype=np.float32)
    rounded = (step[..., 0] * whole).astype(np.float16).astype(np.float64)
    left_out = rounded - step[..., 0].astype(np.float16).astype(np.float64) * whole
    size = GGML_QUANT_SIZES[GGMLQuantizationType[checkpoint.stored_as(names[0])]][1]
    data = np.concatenate([checkpoint.packed(name, slice(None)) for name in names])
    least = np.ascontiguousarray(data.reshape(len(data), -1, size)[..., 2:4]).view(np.float16)[..., 0]
    return left_out @ least.T.astype(np.float64)


INT8 = ("Q8_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "IQ2_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4")


@needs_llama
@pytest.mark.parametrize("kind", [*INT8, "F16", "BF16"])
def test_the_rounding_is_the_engines(gguf, kind: str) -> None:
    """On the engine's own activations nothing is left but the order of the sums."""
    file = gguf("qwen2", kind, 1)
    trace, _ = capture(file, TOKENS)
    for stage, source, names in (
        ("qkv_matmul", "attn_norm", [f"self_attn.{part}_proj" for part in "qkv"]),
        ("ffn_out", "ffn_swigl", ["mlp.down_proj"]),
    ):
        x, checkpoint = trace[f"layer-1/{source}"], open_checkpoint(file)
        names = [f"model.layers.1.{name}.weight" for name in names]
        weight = np.concatenate([checkpoint.tensor(name).astype(np.float64) for name in names])
        rounded = np.asarray(round_activations(jnp.asarray(x), str(activation_of(checkpoint, names[0]))), np.float64)
        product, found = rounded @ weight.T, trace[f"layer-1/{stage}"]
        if kind in ("Q4_1", "Q5_1"):
            assert distance(product, found) < 1e-3  # little beside the rounding of activations
            product += sums_in_half(x, checkpoint, names)
        assert distance(product, found) < 1e-6 < 1e-4 < distance(x @ weight.T, found)


@needs_llama
@pytest.mark.parametrize(
    ("knobs", "first"), [({"rope_freq_base": 10000.0}, "q_post_rope"), ({"attention_type": 1}, "attn_softmax")]
)
def test_a_fault_is_more_than_the_rounding(gguf, tmp_path: Path, knobs: dict, first: str) -> None:
    file = gguf("qwen2", "Q8_0")
    write_tree(file, tmp_path / "truth", TOKENS, dtype="float64")
    dump(file, tmp_path / "engine", TOKENS, **knobs)
    result = compare(tmp_path / "truth", tmp_path / "engine")
    assert result.first is not None and result.first.key == (0, first), as_text(result)


@needs_llama
def test_the_yardstick_must_round_as_the_engine(gguf, tmp_path: Path) -> None:
    file = gguf("qwen2", "Q8_0")
    for name, dtype in (("truth", "float64"), ("exact", "float32")):
        write_tree(file, tmp_path / name, TOKENS, dtype=dtype, stages="attn_norm")
    dump(file, tmp_path / "engine", TOKENS, stages="attn_norm")
    with pytest.raises(UserError, match="--activations stored"):
        compare(tmp_path / "truth", tmp_path / "engine", tmp_path / "exact")


@needs_llama
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe"])
def test_an_engines_quantised_weights_are_told_from_the_models(gguf, tmp_path: Path, arch: str, kind: str) -> None:
    """llama.cpp on a GGUF, explained by the checkpoint that the GGUF was made of."""
    dump(gguf(arch, kind), tmp_path, TOKENS, positions="all")
    (tmp_path / "manifest.json").unlink()  # most engines write none
    told = explain(open_checkpoint(gguf(arch, kind).parent / arch), tmp_path, TOKENS)
    named = {cause.stage: cause.explanation and cause.explanation.hypothesis for cause in told.causes}
    parameters = {str(cause.explanation and cause.explanation.parameter) for cause in told.causes}
    assert set(named.values()) == {"weight_rounded"}, named
    assert parameters == {kind, f"{kind} both"}, parameters
    assert any("the engine's weights are not MODEL's" in note for note in told.found.notes)


@needs_llama
@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *(("qwen2", kind) for kind in ("F32", "Q8_0", "Q4_1", "Q4_K", "IQ4_XS")),
        *(("qwen3_moe", kind) for kind in ("F32", "Q8_0", "Q4_K")),
    ],
)
def test_localize_finds_nothing_in_a_clean_engine(gguf, tmp_path: Path, arch: str, kind: str) -> None:
    file = gguf(arch, kind)
    dump(file, tmp_path / "engine", TOKENS, positions="all")
    found = localize(open_checkpoint(file), tmp_path / "engine")
    assert found.numerics == ("float32" if kind == "F32" else "q8")
    assert found.verdict == "clean", [(row.key, row.local, row.floor) for row in found.locals if row.faulty]


@needs_llama
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_engines_theta_is_named_with_its_value(gguf, tmp_path: Path, kind: str) -> None:
    file = gguf("qwen2", kind)
    dump(file, tmp_path / "engine", TOKENS, rope_freq_base=10000.0)
    told = explain(open_checkpoint(file), tmp_path / "engine")
    assert {cause.stage for cause in told.causes} == {"q_post_rope", "k_post_rope"}
    for cause in told.causes:
        assert cause.layers == (0, 1, 2) and cause.explanation is not None
        assert (cause.explanation.hypothesis, cause.explanation.parameter) == ("rope_theta", 10000.0)
