"""For other people's tests: one call that fails with the table of the compare as its message."""

from __future__ import annotations

from collections.abc import Sequence

from oracle.comparer import compare
from oracle.report import as_text
from oracle.result import Result
from oracle.rules import Options
from oracle.sources import Given
from oracle.tolerances import compile_missing, parse_tolerance
from oracle.verdict import MAX_RATIO, check_dtype


def assert_parity(
    reference: Given,
    test: Given,
    hf: Given | None = None,
    *,
    tolerances: Sequence[str] = (),
    min_cosine: float | None = None,
    max_ratio: float = MAX_RATIO,
    allow_missing: Sequence[str] = (),
    accept_layout: bool = False,
    test_dtype: str | None = None,
    positions: Sequence[int] | None = None,
) -> Result:
    """Compare two trees, or three, as `python -m oracle compare` does, with its options by their names.

    Returns the result. Raises `AssertionError` with the whole report where the verdict is not "agree", and `UserError`
    for trees that cannot be compared.
    """
    __tracebackhide__ = True  # pytest shows the line of the test, not this one
    options = Options(
        tuple(parse_tolerance(text) for text in tolerances),
        min_cosine,
        max_ratio,
        compile_missing(allow_missing),
        accept_layout,
        check_dtype(test_dtype),
        None if positions is None else tuple(positions),
    )
    result = compare(reference, test, hf, options)
    if result.exit_code:
        raise AssertionError("\n" + as_text(result))
    return result
