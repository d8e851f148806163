"""Faults in stages that the tree lacks are named at the next one that it has: fused attention, hidden states alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxref.stages import STAGES
from oracle.explain import Explained, explain
from oracle.local import TELLS
from oracle.told import sentence
from tests.conftest import prompt
from tests.oracle.standin import FAULTS, Planted, run, write
from tests.oracle.sweep import LAYER, Models, Outcome, sweep, table

FUSED = ("attn_scores", "attn_softmax")
HIDDEN = ("embedding", "post_attn_residual", "post_ffn_residual", "final_norm", "lm_head")
INSIDE = ("moe_router_logits", *(name for name in STAGES if name.startswith("moe_expert_")))
# q·k depends on the distance of two positions alone: where only scores or what follows is seen, nothing is wrong.
UNSEEN = "rope_positions"


@pytest.mark.parametrize(
    ("arch", "lost"),
    [
        ("qwen2", FUSED),
        ("qwen3_moe", (*FUSED, *INSIDE)),
        ("qwen3", tuple(name for name in STAGES if name not in HIDDEN)),
    ],
)
def test_every_fault_of_the_catalogue_through_missing_stages(tmp_path: Path, arch: str, lost: tuple[str, ...]) -> None:
    outcomes: list[Outcome] = list(sweep(tmp_path, arch, "float32", LAYER, lost=lost))
    print(table(outcomes))
    assert len(outcomes) > 90
    seen = [o for o in outcomes if not o.fault.startswith(UNSEEN) or "q_post_rope" not in lost]
    assert all(o.stage_right for o in seen), table(outcomes)
    assert sum(o.cause_right for o in outcomes) >= 0.94 * len(outcomes), table(outcomes)
    assert not [o.fault for o in outcomes if o.confident_and_wrong], table(outcomes)


def _one_layer(
    folder: Path, arch: str, faults: dict, dtype: str = "float32", tokens: list[int] | None = None
) -> Explained:
    """An engine's dump of layer 2 alone."""
    raw, weights, checkpoint = Models(folder.with_name("models")).get(arch, Planted("", ()))
    write(folder, run(raw, weights, prompt(23, 272), dtype, faults))
    for path in folder.iterdir():
        if path.name != "layer-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return explain(checkpoint, folder, tokens)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3_moe"])
def test_a_layer_alone_is_not_blamed_for_what_came_in(tmp_path: Path, arch: str, dtype: str) -> None:
    told = _one_layer(tmp_path / "tree", arch, {"rope_theta/500000": {0}}, dtype, prompt(23, 272))
    assert told.found.verdict == "clean", sentence(told)
    assert told.found.unknown == {(2, "post_attn_residual"): TELLS}
    (note,) = (note for note in told.found.notes if "hidden state before layer 2" in note)
    assert float(note.split(" is ")[1].split()[0]) > 0.01  # the wrong theta of layer 0
    assert all(row.inherited for row in told.found.locals if row.key[1] == "attn_norm")


def test_a_layer_alone_tells_its_own_faults_even_without_tokens(tmp_path: Path) -> None:
    told = _one_layer(tmp_path / "tree", "qwen2", {"norm_weight_missing/attn_norm": {2}, "mask_strict": {2}})
    assert [(cause.stage, cause.explanation and cause.explanation.hypothesis) for cause in told.causes] == [
        ("attn_norm", "norm_weight_missing"),
        ("attn_softmax", "mask_strict"),
    ]


def test_as_many_experts_as_the_engine_has_ids(tmp_path: Path) -> None:
    """Their weights are missing: the right ones are those of as many experts."""
    lost = tuple(name for name in STAGES if name not in (*HIDDEN, "moe_router_indices"))
    names = [name for name in FAULTS if name.startswith("router_count")]
    outcomes = list(sweep(tmp_path, "qwen3_moe", "float32", LAYER, names, lost))
    assert outcomes and {stage for o in outcomes for stage in o.found} == {"moe_router_indices"}, table(outcomes)
    assert {c.explanation and c.explanation.hypothesis for o in outcomes for c in o.causes} == {"router_count"}
