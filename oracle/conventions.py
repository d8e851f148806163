"""How known programs write their trees, told by what is there, and whether a tree can be of a model at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxref.stages import STAGES
from oracle.same import SAME_MODEL
from oracle.trees import Tree, path_of
from oracle.verdict import coarser_of
from weights import Config, UserError
from weights.errors import listed

SCRIPT_LACKS = "post_attn_residual"
# Which model a stage speaks for, where the model that is asked about has no such stage.
_MARKS = ((("moe_",), "qwen3_moe"), (("qkv_bias",), "qwen2"), (("q_norm", "k_norm"), "qwen3"), (("ffn_",), "qwen3"))
_STREAM = ("embedding", "attn_norm", "post_attn_residual", "ffn_norm", "post_ffn_residual")


@dataclass(frozen=True)
class Convention:
    """`lacks`: stages that are not missed. `head_major`: q and k after RoPE lie as [H, S, h]."""

    name: str
    lacks: frozenset[str]
    head_major: bool = False


def recognise(tree: Tree) -> Convention | None:
    """The convention of a tree without a manifest; None for a tree that says what it holds.

    An engine knows the canonical stages alone. The Hugging Face script of `apr` also has no post_attn_residual in any
    layer, and leaves q and k head-major. Hooks on modules see what these give, and nothing between them.
    """
    if tree.manifest is not None:
        return None
    if tree.unseen:
        return Convention("what modules give", tree.unseen)
    present = {stage for _, stage in tree.files}
    extensions = frozenset(name for name, stage in STAGES.items() if not stage.canonical)
    if present & extensions:
        return None
    if SCRIPT_LACKS not in present and {"attn_out", "ffn_norm"} <= present:
        return Convention(
            "the Hugging Face script of apr (head-major q and k)", extensions | {SCRIPT_LACKS}, head_major=True
        )
    return Convention("an engine without a manifest", extensions)


def of_model(tree: Tree, config: Config) -> list[str]:
    """Notes on what in a tree speaks against its being of a model.

    Raises `UserError` for the manifest of another model, for layers counted from 1, and for more than the model has.
    """
    if tree.config is not None:
        pairs = [(name, getattr(tree.config, name), getattr(config, name)) for name in SAME_MODEL]
        if words := [f"{name} {theirs}, not {ours}" for name, theirs, ours in pairs if theirs != ours]:
            raise UserError(f"{tree.folder}: the {tree.role} tree is of another model: {'; '.join(words)}")
    count = config.num_hidden_layers
    layers = {key[0]: key for key in tree.files if key[0] is not None}
    deepest = max(layers, default=-1)
    before = {stage for layer, stage in tree.files if layer == 0}
    if before <= {"embedding"} and (deepest == count or (deepest > 0 and (1, "embedding") in tree.files)):
        words = f"its layers seem to be counted from 1 (to layer-{deepest}), and are read from layer-0"
        raise UserError(f"{tree.folder}: {words}; rename them, and count so in the files' headers too")
    seems = seems_of(tree, config)
    if deepest >= count:
        words = f"holds {path_of(layers[deepest])}, the model has {count} layers"
        raise UserError(f"{tree.folder}: {'; '.join([words, *seems])}")
    if tree.config is None and 0 <= deepest < count - 1 and any(key[0] is None for key in tree.files):
        seems.append(f"{tree.folder}: ends at layer-{deepest}, the model has {count} layers: the rest is not there")
    return seems


def seems_of(tree: Tree, config: Config) -> list[str]:
    """One line on the model that a tree seems to be of, by its stages that this one has not; none where it has all."""
    strange = {stage for layer, stage in tree.files if not STAGES[stage].exists(config, layer)}
    for begin, model in _MARKS:
        if found := [stage for stage in STAGES if stage in strange and stage.startswith(begin)]:
            words = f"looks like {model} (it holds {listed(found)}), MODEL is {config.model_type}"
            return [f"{tree.folder}: {words}"] if model != config.model_type else []
    return []


def check_positions(tree: Tree, dims: Mapping[str, int]) -> None:
    """Raise `UserError` where --positions names others than a prompt has, or another number than the tree's rows."""
    asked = tree.asked_positions
    if asked is None:
        return
    if outside := [position for position in asked if not 0 <= position < dims["S"]]:
        words = f"--positions {listed(outside, ',')}: the prompt has {dims['S']} tokens, positions 0 to {dims['S'] - 1}"
        raise UserError(f"{tree.folder}: {words}")
    rows = dict(_rows(tree, dims["D"]))
    if rows and len(asked) not in rows.values():
        path, count = next(iter(rows.items()))
        words = f"{path} holds {count} rows, --positions names {len(asked)}"
        raise UserError(f"{tree.folder}: {words}")


def _rows(tree: Tree, width: int) -> Iterator[tuple[str, int]]:
    """How many rows the hidden states have, where their size fits the width."""
    for key in tree.files:
        if key[1] in _STREAM:
            rows, rest = divmod(tree.open(key).values.size, width)
            if rows and not rest:
                yield path_of(key), rows


def mixed_up(reference: Tree, test: Tree) -> Iterator[str]:
    """Notes where the two trees seem to be given the wrong way round, or are one."""
    if reference.folder.resolve() == test.folder.resolve():
        yield f"{test.folder}: is compared with itself"
        return
    ours, theirs = reference.stated_dtype, test.stated_dtype
    coarser = None not in (ours, theirs) and ours != theirs and coarser_of(str(ours), str(theirs)) == ours
    if coarser or (reference.manifest is None and test.manifest is not None):
        told = f"it is {ours}, {test.folder} {theirs}" if coarser else f"it has no manifest, {test.folder} has"
        yield f"{reference.folder}: is it the reference? {told}; REFERENCE comes first"
