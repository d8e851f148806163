"""Whether trees are of one run: the same tokens through the same model, as far as their manifests say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from oracle.trees import Tree
from oracle.verdict import coarser_of
from weights import UserError
from weights.errors import listed
from weights.identity import differing

# What must agree in two manifests for the trees to be of one model.
SAME_MODEL = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " head_dim num_experts num_experts_per_tok moe_intermediate_size"
).split()


def same_run(trees: Mapping[str, Tree]) -> list[str]:
    """Raise `UserError` for trees of other tokens or another model; notes on what else differs in their manifests."""
    notes: list[str] = []
    first = next((tree for tree in trees.values() if tree.manifest is not None), None)
    for tree in trees.values():
        if first is None or tree is first or tree.manifest is None:
            continue
        if None not in (tree.tokens, first.tokens) and tree.tokens != first.tokens:
            raise UserError(f"{first.folder} and {tree.folder} are of other tokens: {_short(first)} and {_short(tree)}")
        notes += _same_model(first, tree)
        notes += _same_weights(first, tree)
    return notes


def _same_weights(first: Tree, second: Tree) -> Iterator[str]:
    """Refuse weights whose digests differ; another file or header may still hold the same model."""
    ours, theirs = stated_weights(first), stated_weights(second)
    if others := differing(ours, theirs):
        raise UserError(
            f"weights differ: {first.folder} and {second.folder} are of different models: the bytes of"
            f" {listed(others)} differ"
        )
    headers = [sorted(str(file.get("header_sha256")) for file in files) for files in (ours, theirs)]
    if ours and theirs and headers[0] != headers[1]:
        yield f"{first.folder} and {second.folder} were made from different weight files"


def stated_weights(tree: Tree) -> list[dict[str, Any]]:
    """The files of weights that a tree's manifest tells of, with their digests."""
    return (tree.manifest or {}).get("weights") or []


def coarse_yardstick(hf: Tree, test: Tree, test_dtype: str | None) -> Iterator[str]:
    """A note where the yardstick rounds to fewer bits than the test, as far as what they say, or their values, tell."""
    yardstick = hf.stated_dtype or hf.guess_dtype()
    stated = test_dtype or test.stated_dtype
    dtype = stated or test.guess_dtype()
    if yardstick != dtype and coarser_of(yardstick, dtype) == yardstick:
        theirs = dtype if stated else f"by its values {dtype} (--test-dtype)"
        yield f"the yardstick is {yardstick}, the tree under test {theirs}: its noise hides smaller faults"


def _short(tree: Tree) -> str:
    tokens = tree.tokens or []
    return ",".join(map(str, tokens[:8])) + (f",… ({len(tokens)})" if len(tokens) > 8 else "")


def _same_model(first: Tree, second: Tree) -> Iterator[str]:
    ours, theirs = (vars(tree.config) if tree.config else None for tree in (first, second))
    if ours is None or theirs is None:
        return
    differing = [name for name in ours if _plain(ours[name]) != _plain(theirs[name])]
    words = [f"{name} {ours[name]} and {theirs[name]}" for name in differing]
    if set(differing) & set(SAME_MODEL):
        raise UserError(f"{first.folder} and {second.folder} are of different models: {', '.join(words)}")
    if words:
        yield f"the configs of {first.folder} and {second.folder} differ: {', '.join(words)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
