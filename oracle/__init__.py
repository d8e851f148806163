"""Compare, localize, explain: verdicts over trees, and the Hugging Face path. Nothing heavy is imported until used."""

from typing import TYPE_CHECKING

from weights.lazily import lazily

if TYPE_CHECKING:
    from oracle.comparer import compare
    from oracle.testing import assert_parity, assert_weights

__all__ = ["assert_parity", "assert_weights", "compare"]

_HOME = {"oracle.comparer": ("compare",), "oracle.testing": ("assert_parity", "assert_weights")}

__getattr__ = lazily(__name__, _HOME)
