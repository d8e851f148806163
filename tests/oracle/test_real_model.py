"""Why a third oracle is worth having, on a real checkpoint: `make test ARGS="--real-model DIR"`."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxref.aprt import aprt_header
from oracle.blocks import PARTS
from oracle.comparer import compare
from oracle.explain import explain
from oracle.report import as_text
from oracle.rules import Options
from tests.commands import ROOT, command
from tests.oracle.faults import write
from tests.trees import write_tree
from weights import open_checkpoint

TOKENS = [3838, 374, 220, 17, 10, 17, 30]  # What is 2+2?


@pytest.mark.real_model
def test_float16_noise_is_nobodys_fault(real_model, tmp_path) -> None:
    hf = pytest.importorskip("oracle.hf", reason="needs torch: pip install 'jaxref[hf]'")
    folder = real_model / "hf"
    for dtype in ("float64", "float16"):
        write_tree(folder, tmp_path / dtype, TOKENS, dtype=dtype)
    write(tmp_path / "test", hf.capture(hf.load(folder, "float16"), TOKENS))
    result = compare(tmp_path / "float64", tmp_path / "test", tmp_path / "float16")
    assert result.verdict == "agree", as_text(result)
    assert result.blame.words == "nobody: inside the rounding noise of float16"
    worst = max(result.comparisons, key=lambda c: c.test.relative_l2)
    assert worst.key == (0, "attn_softmax") and worst.test.relative_l2 == pytest.approx(0.037, abs=0.005)
    two_way = compare(tmp_path / "float64", tmp_path / "test", options=Options(min_cosine=0.9999))
    assert two_way.first is not None and two_way.first.key == (0, "attn_softmax")


@pytest.mark.real_model
def test_llama_cpp_is_clean_but_for_its_rounding_of_activations(real_model, tmp_path) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install 'jaxref[llama-cpp]'")
    from tests.oracle.test_llama_cpp import dump

    file = next(real_model.glob("*.gguf"))
    assert open_checkpoint(file).tokenizer().encode("What is 2+2?") == TOKENS
    write_tree(file, tmp_path / "truth", TOKENS, dtype="float64")
    write_tree(file, tmp_path / "stored", TOKENS, as_stored=True)
    dump(file, tmp_path / "llama", TOKENS)
    for hf in (None, tmp_path / "stored"):
        result = compare(tmp_path / "truth", tmp_path / "llama", hf)
        assert result.verdict == "agree" and result.blame.who == "none", as_text(result)
        assert max(c.test.relative_l2 for c in result.comparisons) > 0.01


@pytest.mark.real_model
def test_an_engine_that_leaves_out_the_high_bits_of_q6_k_is_told_so(real_model, tmp_path) -> None:
    """README's example. The engine is jaxref on a copy of the file without those bits."""
    file, copy = next(real_model.glob("*.gguf")), tmp_path / "model.gguf"
    shutil.copy(file, copy)
    checkpoint, data = open_checkpoint(file), np.memmap(copy, np.uint8, "r+")
    for stored in (entry for part in checkpoint.files.values() for entry in part.entries.values()):
        if stored.kind.name == "Q6_K":
            blocks = data[stored.offset : stored.offset + stored.nbytes].reshape(-1, 210)
            blocks[:, PARTS["Q6_K"]["qh"]] = 0
    data.flush()
    write_tree(copy, tmp_path / "engine", TOKENS)
    (tmp_path / "engine" / "manifest.json").unlink()
    told = explain(checkpoint, tmp_path / "engine", TOKENS, numerics="f32")
    (cause,) = told.causes
    assert cause.explanation is not None and cause.stage == "ffn_out" and len(cause.layers) == 12
    assert cause.explanation.text == "blocks of Q6_K: the high bits in qh are not used"
    assert any("12 products that read weights in Q6_K are all wrong, and the 109" in note for note in told.found.notes)
    name = "model.layers.3.mlp.down_proj.weight"
    wrong = open_checkpoint(copy).tensor(name)
    (tmp_path / "mine.bin").write_bytes(aprt_header(3, wrong.shape) + wrong.tobytes())
    done = command("weight", checkpoint.folder, "blk.3.ffn_down.weight", tmp_path / "mine.bin", module="oracle")
    assert done.returncode == 1 and done.stdout in (ROOT / "README.md").read_text(encoding="utf-8")
    tensors = {name: open_checkpoint(copy).tensor(name).astype(np.float16) for name in checkpoint.tensor_names}
    save_file(tensors, tmp_path / "loaded.safetensors")
    done = command("weight", checkpoint.folder, "all", tmp_path / "loaded.safetensors", module="oracle")
    assert done.returncode == 1 and done.stdout in (ROOT / "README.md").read_text(encoding="utf-8"), done.stdout
