"""When a local error is a fault: more than a few times what the engine's own roundings make of the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping

# A stage is faulty where its local error is more than so many times its floor.
MARGIN = 4.0
# The spacing of float32 below one. A sum of n terms in any order is off by about √n of it.
ULP = 2.0**-24
NORMS = {"attn_norm", "ffn_norm", "final_norm", "q_norm", "k_norm"}
PRODUCTS = {"qkv_matmul", "attn_scores", "attention", "attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head"}
EXPERTS = {"moe_router_logits", "moe_expert_gate", "moe_expert_up", "moe_expert_out"}
ROPE = {"q_post_rope", "k_post_rope"}
# Norms, whose whole rows a wrong eps scales: by less than half precision rounds one value, but all of them alike.
DRIFTING = {"attn_norm", "ffn_norm", "final_norm"}


def noise(stage: str, last: int, dims: Mapping[str, int]) -> float:
    """What another order of sums, or another way to the angles of position `last`, does in float32; relative L2."""
    width = max(dims[letter] for letter in "DFhHM") if stage in NORMS | PRODUCTS | EXPERTS else 1
    return ULP * (math.sqrt(width) + (last if stage in ROPE else 0))
