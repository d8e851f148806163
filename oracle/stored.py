"""How the tensors that stages read are stored, and what it says where those of one type are wrong."""

from __future__ import annotations

from jaxref import attention, ops
from jaxref.stages import STAGES, Key
from oracle.local import Local
from weights import Checkpoint
from weights.params import expert_names, layer_names

WHOLE = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}
# So many products of one type are no accident.
SEVERAL = 2


def tensor_name(checkpoint: Checkpoint, layer: int | None, field: str, expert: int | None = None) -> str:
    """The name of a tensor in the checkpoint: of an expert, of a layer, or of the whole model."""
    if field == "head":
        return checkpoint.head_name
    if field in WHOLE:
        return WHOLE[field]
    if layer is None:
        return field
    names = layer_names(checkpoint.config, layer) if expert is None else expert_names(layer, expert)
    return str(getattr(names, field))


def types(checkpoint: Checkpoint, key: Key) -> set[str]:
    """How the matrices of a stage are stored; nothing of experts that are parts of another tensor."""
    stage = STAGES[key[1]]
    if stage.per_expert and checkpoint.stacked:
        return set()
    expert = 0 if stage.per_expert else None
    return {checkpoint.stored_as(tensor_name(checkpoint, key[0], field, expert)) for field in stage.params}


def one_type_wrong(checkpoint: Checkpoint, rows: list[Local]) -> list[str]:
    """A note where the products with weights of one type are wrong, all of them, and no others.

    Nothing where these are all that there is of one stage, which may be wrong for another reason.
    """
    products = {
        row.key: row.faulty for row in rows if STAGES[row.key[1]].function in (ops.linear, attention.qkv_matmul)
    }
    by_key = {key: types(checkpoint, key) for key in products}
    for kind in sorted(set().union(*by_key.values())):
        those, others = [[key for key in products if (kind in by_key[key]) is inside] for inside in (True, False)]
        if len(those) < SEVERAL or not others or not all(products[key] is (key in those) for key in products):
            continue
        stages = {stage for _, stage in those}
        if len(stages) > 1 or not stages.isdisjoint(stage for _, stage in others):
            return [
                f"the {len(those)} products that read weights in {kind} are all wrong, and the {len(others)} others are"
                f" right: look at how the engine reads {kind}"
            ]
    return []
