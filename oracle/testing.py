"""For other people's tests: one call that fails with the table of the compare as its message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxref.one_file import open_one_file
from oracle.comparer import compare
from oracle.report import as_text
from oracle.result import Result
from oracle.rules import Options
from oracle.sources import Given, array_of
from oracle.tolerances import compile_missing, parse_tolerance
from oracle.verdict import MAX_RATIO, check_dtype
from oracle.weight_all import Judged, judge_all, lines
from oracle.weight_parts import held_names
from weights import Checkpoint, open_checkpoint


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


def assert_weights(model: str | Path | Checkpoint, tensors: str | Path | Mapping[str, Any]) -> Judged:
    """Compare what an engine holds with the checkpoint, as `python -m oracle weight MODEL all FILE` does.

    `tensors` are arrays by their names (Hugging Face's or GGUF's; of q, k and v or gate and up in one, too), NumPy's,
    JAX's or torch's, as in a `state_dict`, or a safetensors or `.npz` file of them. Returns what was found. Raises
    `AssertionError` with the report where one differs by more than a rounding or one of the model's is missing, and
    `UserError` where there is nothing to compare.
    """
    __tracebackhide__ = True
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if isinstance(tensors, Mapping):
        found = judge_all(checkpoint, _Converted(tensors), "tensors")
    else:
        found = judge_all(checkpoint, open_one_file(Path(tensors), wanted=held_names(checkpoint)), str(tensors))
    if found.exit_code:
        raise AssertionError("\n" + "\n".join(lines(found)))
    return found


class _Converted(Mapping[str, np.ndarray]):
    """Arrays of any library as NumPy's, one at a time, since an engine's may lie on another device."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return np.atleast_1d(array_of(self._tensors[name], Path("tensors") / str(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
