"""What a row of the table of stages holds: a stage's shape, which models have it, and how it is run on anyone's inputs.

The table itself is in `jaxref/stages.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from jaxref import stage_settings as at
from jaxref.precision import Numerics
from jaxref.stage_settings import Settings
from weights import Config

QKV = "(H+2K)h"
DIMENSIONS = {
    "S": "positions (tokens)",
    "D": "hidden_size",
    "H": "query heads",
    "K": "key/value heads",
    "h": "head_dim",
    "F": "intermediate_size",
    "E": "experts",
    "A": "experts per token",
    "M": "moe_intermediate_size",
    "V": "vocab_size",
    "L": "layers",
}


@dataclass(frozen=True)
class Stage:
    """One row. `inputs` name upstream stages (`a|b`: the first that the model has), `params` fields of Layer or Params.

    `scope` is "layer", "first" (layer 0 only) or "model" (once, layer None). `last`: by default only the last position
    is written. `settings` gives the function's keyword arguments beside `numerics`. `per_expert`: the function takes
    the rows [C, ·] of one expert's tokens and `params` are fields of that `Expert`.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    function: Callable[..., Array]
    inputs: tuple[str, ...]
    params: tuple[str, ...] = ()
    settings: Settings = at.nothing
    scope: str = "layer"
    when: Callable[[Config, int], bool] = at.always
    canonical: bool = True
    last: bool = False
    per_expert: bool = False

    @property
    def row_axis(self) -> int:
        """The axis that counts query positions."""
        return self.axes.index("S")

    def exists(self, config: Config, layer: int | None) -> bool:
        """Whether this model has the stage at this layer (None: once for the whole model)."""
        if (layer is None) != (self.scope == "model"):
            return False
        return layer is None or ((self.scope == "layer" or layer == 0) and self.when(config, layer))

    def shape(self, config: Config, count: int, rows: int | None = None) -> tuple[int, ...]:
        """The shape for `count` positions, with only `rows` of the query positions where that is given."""
        dims = config.dims() | {"S": count}
        sizes = [axis_size(axis, dims) for axis in self.axes]
        if rows is not None:
            sizes[self.row_axis] = rows
        return tuple(sizes)

    def run(
        self,
        inputs: Sequence[Array | np.ndarray],
        params: Any,
        config: Config,
        layer: int | None,
        numerics: Numerics,
        **changes: Any,
    ) -> Array:
        """Replay the stage on anyone's inputs; `changes` replace settings, which is how a hypothesis is tried."""
        weights = [getattr(params, field) for field in self.params]
        settings = self.settings(config, layer or 0) | changes
        return self.function(*inputs, *weights, **settings, numerics=numerics)


def axis_size(axis: str, dims: Mapping[str, int]) -> int:
    """The size of an axis: `Hh` is a product of letters, `(H+2K)h` the one sum."""
    if axis == QKV:
        return (dims["H"] + 2 * dims["K"]) * dims["h"]
    return math.prod(dims[letter] for letter in axis)
