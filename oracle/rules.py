"""How to compare: what the user asks for, and the bounds that follow for a set of trees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oracle.same import coarse_yardstick
from oracle.tolerances import Missing, Tolerance
from oracle.trees import Tree
from oracle.verdict import Rules, coarser_of
from weights import UserError


@dataclass(frozen=True)
class Options:
    """How to compare. `positions` (of the test's rows) and `test_dtype` are for trees whose manifest does not say."""

    tolerances: tuple[Tolerance, ...] = ()
    min_cosine: float | None = None
    max_ratio: float = 2.0
    allow_missing: Missing | None = None
    accept_layout: bool = False
    test_dtype: str | None = None
    positions: tuple[int, ...] | None = None


def rules_of(trees: Mapping[str, Tree], options: Options, dims: Mapping[str, int]) -> tuple[Rules, list[str]]:
    """The bounds for these trees, by the dtypes and the dimensions they have, and notes on how these were told.

    Raises `UserError` for a yardstick of another precision than the test's.
    """
    notes: list[str] = []
    test, hf = trees["test"], trees.get("hf")
    yardstick = hf.stated_dtype if hf else None
    dtype = options.test_dtype or test.stated_dtype or yardstick
    if dtype is None:
        dtype = test.guess_dtype()
        notes.append(f"the test tree does not say its dtype; its values are those of {dtype} (--test-dtype)")
    if yardstick is not None and yardstick != dtype:
        raise UserError(f"the yardstick is {yardstick} and the test {dtype}; --hf takes a tree in the test's dtype")
    if hf is not None:
        notes += coarse_yardstick(hf, test, options.test_dtype)
    reference = trees["reference"].stated_dtype or "float32"
    rounded = coarser_of(dtype, test.stated_activations or dtype)
    if rounded != dtype:
        notes.append(f"the engine rounds activations to {rounded} before it multiplies: the bounds know")
    if hf is not None and rounded != dtype and hf.stated_activations != test.stated_activations:
        raise UserError(
            f"the test rounds activations to {rounded} before it multiplies and the yardstick does not; make it by"
            " `python -m jaxref dump MODEL.gguf --activations stored`"
        )
    rules = Rules(
        dtype,
        coarser_of(rounded, reference),
        options.tolerances,
        options.min_cosine,
        options.max_ratio,
        dims["S"],
        max(dims["D"], dims["F"], dims["M"], dims["H"] * dims["h"]),
    )
    return rules, notes
