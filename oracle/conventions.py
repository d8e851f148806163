"""How known programs write their trees, told by what is there: what such a tree may lack, and how q and k lie in it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxref.stages import STAGES
from oracle.trees import Tree

SCRIPT_LACKS = "post_attn_residual"


@dataclass(frozen=True)
class Convention:
    """`lacks`: stages that are not missed. `head_major`: q and k after RoPE lie as [H, S, h]."""

    name: str
    lacks: frozenset[str]
    head_major: bool = False


def recognise(tree: Tree) -> Convention | None:
    """The convention of a tree without a manifest; None for a tree that says what it holds.

    An engine knows the canonical stages alone. The Hugging Face script of `apr` also has no post_attn_residual in any
    layer, and leaves q and k head-major.
    """
    if tree.manifest is not None:
        return None
    present = {stage for _, stage in tree.files}
    extensions = frozenset(name for name, stage in STAGES.items() if not stage.canonical)
    if present & extensions:
        return None
    if SCRIPT_LACKS not in present and {"attn_out", "ffn_norm"} <= present:
        return Convention(
            "the Hugging Face script of apr (head-major q and k)", extensions | {SCRIPT_LACKS}, head_major=True
        )
    return Convention("an engine without a manifest", extensions)
