"""Compare, localize, explain: verdicts over trees, and the Hugging Face path. Nothing heavy is imported until used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oracle.comparer import compare
    from oracle.testing import assert_parity

__all__ = ["assert_parity", "compare"]


def __getattr__(name: str) -> Any:
    if name == "assert_parity":
        from oracle.testing import assert_parity

        return assert_parity
    if name == "compare":
        from oracle.comparer import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
