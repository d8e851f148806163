"""One tensor of a dumped tree, as an array that knows its stage and its axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from jaxref.stage_file import figures_of
from jaxref.stages import STAGES


@dataclass(frozen=True, eq=False, repr=False)
class Named(NDArrayOperatorsMixin):
    """One tensor. NumPy, JAX and matplotlib take it as an array; what they compute from it is a plain array.

    `values` is a read-only map of the file: nothing is read until it is used, and what is read is what lies there then.
    `axes` are None where nobody said them; `figures` (min, max, rms) None where they are taken when it is shown.
    """

    name: str
    values: np.ndarray
    axes: tuple[str, ...] | None
    figures: Mapping[str, float] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """As on disk."""
        return self.values.dtype

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → size; the second S of attention's maps, the keys, is `S'`. Empty where the axes are unknown."""
        found: dict[str, int] = {}
        for axis, size in zip(self.axes or (), self.shape, strict=False):
            found[axis + "'" if axis in found else axis] = size
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [value.values if isinstance(value, Named) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        shape = f"[{axes}]" if axes else f"{list(self.shape)} (axes unknown: no manifest says them)"
        stage = STAGES.get(self.name.rpartition("/")[2])
        figures = figures_of(self.values) if self.figures is None else self.figures
        known = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
        parts = self.name, f"{self.dtype} {shape}", stage.meaning if stage else "", known
        return "  ".join(part for part in parts if part)
