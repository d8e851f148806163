"""What engines really write: bare files, last positions, decode steps, uncausal scores, experts in another order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oracle.comparer import compare
from oracle.coordinates import in_words
from oracle.report import as_text
from oracle.rules import Options
from tests.conftest import prompt
from tests.oracle.faults import map_trace, model, overwrite, run, write, write_reference
from weights import UserError

TOKENS = prompt(12, 272)


@pytest.fixture(scope="module")
def traces() -> dict:
    """(arch, dtype) -> trace."""
    return {
        (arch, dtype): run(*model(arch), TOKENS, dtype)
        for arch in ("qwen2", "qwen3_moe")
        for dtype in ("float64", "float32")
    }


def reference(traces: dict, root: Path, arch: str = "qwen2", **more) -> Path:
    return write_reference(root / "ref", traces[arch, "float64"], model(arch)[1], TOKENS, "float64", **more)


def test_the_upper_triangle_of_the_scores_is_not_compared(traces, tmp_path) -> None:
    def zero(stage: str, x: np.ndarray) -> np.ndarray:
        return np.tril(x) if stage == "attn_scores" else x

    write(tmp_path / "test", map_trace(traces["qwen2", "float32"], zero))
    result = compare(reference(traces, tmp_path), tmp_path / "test")
    assert result.verdict == "agree", as_text(result)
    count = next(c.test.count for c in result.comparisons if c.key[1] == "attn_scores")
    assert count == 6 * 12 * 13 // 2
    # The softmax is zero there everywhere, so there it is compared.
    overwrite(tmp_path / "test" / "layer-2" / "attn_softmax.bin", lambda x: x.__setitem__(1, 0.5))
    first = compare(tmp_path / "ref", tmp_path / "test").first
    assert first is not None and first.key == (2, "attn_softmax")
    assert first.coordinate == {"token": 0, "head": 0, "key": 1}


def test_last_position_against_all(traces, tmp_path) -> None:
    write(tmp_path / "test", traces["qwen2", "float32"], rows=[11])
    for rows in (None, [11], [3, 11]):
        folder = tmp_path / str(rows)
        write_reference(folder, traces["qwen2", "float64"], model("qwen2")[1], TOKENS, "float64", rows=rows)
        result = compare(folder, tmp_path / "test")
        assert result.verdict == "agree", as_text(result)
        assert len(result.comparisons) == 1 + 17 * 4 + 2


def test_a_decode_step_is_placed_by_its_keys(traces, tmp_path) -> None:
    """One row at position 7, with the eight keys so far, and all of the cache's keys."""

    def step(stage: str, x: np.ndarray) -> np.ndarray:
        if stage in ("attn_scores", "attn_softmax"):
            return x[:, 7:8, :8]
        return x[:8] if stage == "k_post_rope" else x[7:8]

    write(tmp_path / "test", map_trace(traces["qwen2", "float32"], step))
    result = compare(reference(traces, tmp_path, last=False), tmp_path / "test")
    assert result.verdict == "agree", as_text(result)
    rows = {c.key[1]: c.test.count for c in result.comparisons if c.key[0] == 1}
    assert (rows["attn_scores"], rows["attn_norm"], rows["k_post_rope"]) == (6 * 8, 72, 8 * 32)
    (tmp_path / "test" / "layer-0" / "k_post_rope.bin").unlink()
    with pytest.raises(UserError, match=r"attn_scores\.bin: 48 values fit no rows"):
        compare(tmp_path / "ref", tmp_path / "test", options=Options(positions=(6,)))


def test_positions_can_be_told(traces, tmp_path) -> None:
    trace = map_trace(traces["qwen2", "float32"], lambda stage, x: x[:, [2, 5]] if x.ndim == 3 else x[[2, 5]])
    write(tmp_path / "test", trace, last=False)
    with pytest.raises(UserError, match="fit no rows"):
        compare(reference(traces, tmp_path, last=False), tmp_path / "test")
    result = compare(tmp_path / "ref", tmp_path / "test", options=Options(positions=(2, 5)))
    assert result.verdict == "agree", as_text(result)


@pytest.mark.parametrize("index", range(4))
def test_coordinates_in_words(traces, tmp_path, index: int) -> None:
    stage, place, words = [
        ("attn_norm", (3, 12), "token 3, dim 12"),
        ("qkv_matmul", (5, 6 * 16 + 17), "token 5, k head 1, dim 1"),
        ("q_post_rope", (11, 5 * 16 + 12), "token 11, head 5, dim 12"),
        ("attn_scores", (2, 9, 4), "token 9, head 2, key 4"),
    ][index]
    trace = map_trace(traces["qwen2", "float32"], lambda name, x: x.copy())
    trace["layer-2"][stage][place] += 10
    write(tmp_path / "test", trace)
    first = compare(reference(traces, tmp_path), tmp_path / "test").first
    assert first is not None and first.key == (2, stage)
    assert in_words(first.coordinate) == words


def reorder(trace: dict, layer: str, token: int, order: list[int]) -> dict:
    """The same experts in another order."""
    trace = map_trace(trace, lambda stage, x: x.copy())
    for stage, x in trace[layer].items():
        if stage in ("moe_router", "moe_router_indices") or stage.startswith("moe_expert"):
            x[token] = x[token][order]
    return trace


def test_experts_compare_in_any_order(traces, tmp_path) -> None:
    write(tmp_path / "test", reorder(traces["qwen3_moe", "float32"], "layer-2", 11, [1, 0]))
    result = compare(reference(traces, tmp_path, "qwen3_moe"), tmp_path / "test")
    assert result.verdict == "agree", as_text(result)
    notes = next(c.notes for c in result.comparisons if c.key == (2, "moe_router_indices"))
    assert notes == ("the same experts in another order",)


def test_a_wrong_expert_is_a_fault_and_a_near_tie_is_none(traces, tmp_path) -> None:
    root = reference(traces, tmp_path, "qwen3_moe", last=False)
    trace = map_trace(traces["qwen3_moe", "float32"], lambda stage, x: x.copy())
    chosen, logits = trace["layer-2"]["moe_router_indices"], trace["layer-2"]["moe_router_logits"]
    other = next(e for e in range(logits.shape[1]) if e not in chosen[4])
    wanted, chosen[4, 1] = int(chosen[4, 1]), other
    write(tmp_path / "test", trace, last=False)
    first = compare(root, tmp_path / "test").first
    assert first is not None and first.key == (2, "moe_router_indices")
    assert f"token 4: expert {wanted} in the reference, {other} in the test" in str(first.judgement.fault)

    # The reference's own logits make it a tie: then the insides of that expert are not compared, and what follows is
    # compared at the tokens before it.
    truth = map_trace(traces["qwen3_moe", "float64"], lambda stage, x: x.copy())
    for run_ in (truth, trace):
        run_["layer-2"]["moe_router_logits"][4, other] = logits[4, wanted] - 1e-7
    trace["layer-2"]["moe_expert_out"][4, 1] += 1
    trace["layer-2"]["moe_ffn_out"][4] += 1
    for stage, x in trace["layer-3"].items():
        x[(slice(None), slice(4, None)) if x.ndim == 3 and stage.startswith("attn") else slice(4, None)] += 0.1
    write_reference(tmp_path / "tied", truth, model("qwen3_moe")[1], TOKENS, "float64", last=False)
    write(tmp_path / "swapped", trace, last=False)
    result = compare(tmp_path / "tied", tmp_path / "swapped")
    bad = [
        c.key for c in result.comparisons if not c.good and c.key[0] is not None and c.key != (2, "post_ffn_residual")
    ]
    assert bad == [], as_text(result)
    assert any("near tie at token 4" in note for c in result.comparisons for note in c.notes)


def test_a_wrong_expert_weight_is_named(traces, tmp_path) -> None:
    """One expert's gate is another's, in a forward that really runs."""
    params, config = model("qwen3_moe")
    gate = np.array(params.layers[2].experts.gate_proj)
    for expert in range(len(gate)):
        gate[expert] = gate[(expert + 1) % len(gate)] if expert == 3 else gate[expert]
    layers = list(params.layers)
    layers[2] = layers[2].replace(experts=layers[2].experts.replace(gate_proj=gate))
    write(tmp_path / "test", run(params.replace(layers=tuple(layers)), config, TOKENS, "float32"), last=False)
    first = compare(reference(traces, tmp_path, "qwen3_moe", last=False), tmp_path / "test").first
    assert first is not None and first.key == (2, "moe_expert_gate")
