"""THE table of llama.cpp's graph: which of its nodes is which stage."""

from __future__ import annotations

import re
from typing import NamedTuple


class Node(NamedTuple):
    """What tells a node of the graph from others: names repeat, so its operation counts, and for some its weight.

    `{}` stands for the layer. Of several nodes of one stage, `part` says which of the contract's columns this one is.
    """

    stage: str
    operation: str
    name: str = ""
    weight: str = ""
    part: str = ""


NODES = (
    Node("embedding", "GET_ROWS", "embd"),
    Node("attn_norm", "MUL", "attn_norm-{}"),
    *(Node("qkv_matmul", "MUL_MAT", f"{part.upper()}cur-{{}}", part=part) for part in "qkv"),
    *(Node("qkv_bias", "ADD", f"{part.upper()}cur-{{}}", part=part) for part in "qkv"),
    Node("q_norm", "MUL", "Qcur_normed-{}"),
    Node("k_norm", "MUL", "Kcur_normed-{}"),
    Node("q_post_rope", "ROPE", "Qcur-{}"),
    Node("k_post_rope", "ROPE", "Kcur-{}"),
    Node("attn_scores", "MUL_MAT", "kq-{}"),
    Node("attn_softmax", "SOFT_MAX", "kq_soft_max-{}"),
    Node("attention", "CONT", "kqv_out-{}"),
    Node("attn_out", "MUL_MAT", weight="blk.{}.attn_output.weight"),
    Node("post_attn_residual", "ADD", "ffn_inp-{}"),
    Node("ffn_norm", "MUL", "ffn_norm-{}"),
    Node("ffn_gate", "MUL_MAT", "ffn_gate-{}"),
    Node("ffn_up", "MUL_MAT", "ffn_up-{}"),
    Node("ffn_swigl", "SWIGLU", "ffn_swiglu-{}"),
    Node("ffn_out", "MUL_MAT", "ffn_out-{}"),
    Node("moe_router_logits", "MUL_MAT", "ffn_moe_logits-{}"),
    Node("moe_router", "DIV", "ffn_moe_weights_norm-{}"),
    Node("moe_router_indices", "VIEW", "ffn_moe_topk-{}"),
    Node("moe_expert_gate", "MUL_MAT_ID", "ffn_moe_gate-{}"),
    Node("moe_expert_up", "MUL_MAT_ID", "ffn_moe_up-{}"),
    Node("moe_expert_swigl", "SWIGLU", "ffn_moe_swiglu-{}"),
    Node("moe_expert_out", "MUL_MAT_ID", "ffn_moe_down-{}"),
    Node("moe_ffn_out", "ADD", "ffn_moe_out-{}"),
    Node("moe_ffn_out", "CONT", "ffn_moe_out-{}"),  # of one expert, there is nothing to add
    Node("post_ffn_residual", "ADD", "l_out-{}"),
    Node("final_norm", "MUL", "result_norm"),
    Node("lm_head", "MUL_MAT", "result_output"),
)
BY_NAME = {(node.operation, node.name): node for node in NODES if node.name}
BY_WEIGHT = {(node.operation, node.weight): node for node in NODES if node.weight}


def pattern(name: bytes) -> tuple[str, int | None]:
    """`attn_norm-3` or `blk.3.attn_output.weight` as the table has it, and the layer."""
    text = name.decode(errors="replace")
    found = re.search(r"(?<=-)\d+$|(?<=^blk\.)\d+(?=\.)", text)
    if found is None:
        return text, None
    return f"{text[: found.start()]}{{}}{text[found.end() :]}", int(found[0])
