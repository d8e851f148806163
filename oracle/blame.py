"""Whom a comparison blames: at the first divergence, or of trees that agree."""

from __future__ import annotations

from collections.abc import Callable

from oracle.result import Comparison, Result
from oracle.trees import path_of
from oracle.verdict import Blame, Rules, odd_one_out


def blame_first(first: Comparison, rules: Rules, apart: Callable[[], float]) -> Blame:
    """Who is wrong at the first divergence; `apart` measures how far test and yardstick are from each other."""
    clear = first.judgement.blame == "test" and not (first.hf and first.hf.mismatched)
    if clear:
        return Blame("test", f"test: {first.judgement.fault}")
    if first.hf is None:
        return Blame("none", "two trees cannot tell who is wrong; a third one by --hf can")
    return odd_one_out(first.test.relative_l2, first.hf.relative_l2, apart(), rules, first.key)


def blame_nobody(result: Result) -> Blame:
    """The verdict on trees that agree: nobody, or a yardstick that is off by itself."""
    if "hf" not in result.trees:
        return Blame("none", "nobody: no divergence")
    off = [c for c in result.comparisons if c.hf and c.hf.relative_l2 > result.rules.bound(c.key)]
    off = [c for c in off if c.hf and c.test.relative_l2 < c.hf.relative_l2 / 10]
    if off:
        words = f"hf: the yardstick is off from {path_of(off[0].key)} on, where test and reference agree"
        return Blame("hf", words)
    return Blame("none", f"nobody: inside the rounding noise of {result.rules.coarser}")
