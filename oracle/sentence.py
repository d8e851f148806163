"""One sentence for a bug report: what differs from what, by how much, where, and of which model."""

from __future__ import annotations

from jaxref.stage import QKV
from jaxref.stages import STAGES
from oracle.coordinates import in_words
from oracle.result import Comparison, Result
from oracle.trees import Tree, path_of

_FAMILIES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE"}


def sentence(result: Result) -> str:
    """What a person can paste into a bug report; where nothing diverges it says so, with the worst stage."""
    model = _model(result)
    count = len(result.missing)
    missing = f"; {many(count, 'stage')} {'is' if count == 1 else 'are'} missing" if count else ""
    if result.first is None:
        return f"{_agreement(result)}{_third(result)}{missing}{model}."
    before = result.last_good
    good = f"every stage before it agrees, the last being {path_of(before)}" if before else "it is the first compared"
    return f"{_difference(result, result.first)}; {good}{_third(result)}{missing}{model}."


def _difference(result: Result, first: Comparison) -> str:
    sides = f"{path_of(first.key)} of {named(result.trees['test'])}", named(result.trees["reference"])
    figures = first.test
    if first.key[1] == "moe_router_indices":
        return f"{sides[0]} differs from {sides[1]}: {first.judgement.fault}"
    if figures.mismatched:
        where = in_words(first.coordinate)
        return f"{sides[0]} has values that are not finite where {sides[1]} has none or others, the first at {where}"
    if first.status == "layout":
        return f"{sides[0]} has the values of {sides[1]} in another order: {first.judgement.fault}"
    name, value = "relative L2", figures.relative_l2
    blamed = first.judgement.blame == "reference"  # the fault's words would be said twice
    bounded = (first.hf is None or blamed) and result.rules.written(first.key) is None
    if bounded and figures.channel_median > value:
        name, value = "a median relative L2 of its channels of", figures.channel_median
    rule = f"bound {result.rules.bound(first.key):.2g}" if bounded else str(first.judgement.fault)
    return f"{sides[0]} differs from {sides[1]} by {name} {value:.3g} ({rule}){_worst(result)}"


def _worst(result: Result) -> str:
    if "token" not in result.worst:
        return ""
    joined = result.first is not None and STAGES[result.first.key[1]].axes[-1] == QKV  # q's, k's and v's heads in a row
    head = f" head {result.worst['head']}" if "head" in result.worst and not joined else ""
    return f", worst at token {result.worst['token']}{head}"


def _third(result: Result) -> str:
    """What the yardstick says at the first divergence, where there is one."""
    first = result.first
    if first is None:
        return f"; {result.blame.words.removeprefix('hf: ')}" if result.blame.who == "hf" else ""
    if first.hf is None:
        return ""
    hf = named(result.trees["hf"])
    if result.blame.who == "reference":
        return f"; {hf} agrees with the test there, so the reference is the odd one out"
    odd = ", the odd one out" if result.blame.who == "hf" else ""
    return f"; {hf} is {first.hf.relative_l2:.2g} off there{odd}"


def _agreement(result: Result) -> str:
    worst = max(result.comparisons, key=lambda c: c.test.relative_l2)
    test, reference = (named(result.trees[role]) for role in ("test", "reference"))
    count = len(result.comparisons)
    where = "the one stage" if count == 1 else f"all {count} stages"
    words = f"{test} agrees with {reference} at {where} compared"
    return f"{words}, relative L2 at most {worst.test.relative_l2:.2g} (at {path_of(worst.key)})"


def _model(result: Result) -> str:
    """The model's name and size and the length of the prompt, from the first manifest that says it."""
    config = next((tree.config for tree in result.trees.values() if tree.config), None)
    tokens = next((tree.tokens for tree in result.trees.values() if tree.tokens), None)
    if config is None or tokens is None:
        return ""
    layers = config.num_hidden_layers
    family = _FAMILIES.get(config.model_type, config.model_type)
    return f"; {family} with {many(layers, 'layer')}, {many(len(tokens), 'token')}"


def many(count: int, word: str) -> str:
    """`1 stage`, `2 stages`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def named(tree: Tree) -> str:
    """Who made a tree and in which dtype, as far as its manifest says; else its folder."""
    producer = (tree.manifest or {}).get("producer")
    who = str(producer) if producer else f"the engine in {tree.folder.name or tree.folder}"
    return f"{who} {tree.stated_dtype}" if tree.stated_dtype else who
