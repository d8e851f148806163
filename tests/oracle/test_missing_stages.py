"""Faults in stages that the tree lacks are named at the next stage that it has: fused attention, hidden states alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxref.stages import STAGES
from tests.oracle.sweep import LAYER, Outcome, sweep, table

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
