"""What to write: stages, layers and positions as people type them, and the list of files that comes of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from jaxref.stage import Stage
from jaxref.stages import STAGES, Key, keys_of, stage_named
from weights import Config, UserError
from weights.errors import brief

# Plain digits: `int` also takes 1_0, and the digits of every script.
_NUMBER = re.compile(r"\s*-?[0-9]{1,12}\s*")


def parse_stages(text: str, config: Config) -> tuple[str, ...]:
    """`all` or a comma list in any case, in computation order. Raises `UserError` for a stage this model lacks."""
    present = list(dict.fromkeys(name for _, name in keys_of(config)))
    if text.strip().lower() == "all":
        return tuple(name for name in STAGES if name in present)
    words = text.split(",")
    if not all(word.strip() for word in words):
        raise UserError(f"stages {brief(text)}: an empty name between commas; stages are {', '.join(present)}")
    names = {stage_named(word).name for word in words}
    if absent := [name for name in STAGES if name in names and name not in present]:
        raise UserError(f"{config.model_type} has no stage {', '.join(absent)}; it has {', '.join(present)}")
    return tuple(name for name in STAGES if name in names)


def whole_number(word: str) -> int:
    """Digits as people write them: not `1_0` nor other scripts' digits, as `int` has it. Raises `ValueError`."""
    if not _NUMBER.fullmatch(word):
        raise ValueError(word)
    return int(word)


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """`all`, `START..END` (END exclusive) or a comma list, for a model of `count` layers."""
    text = text.strip().lower()
    if text == "all":
        return tuple(range(count))
    try:
        if ".." in text:
            start, end = (whole_number(part) for part in text.split(".."))
            if end <= start:
                raise UserError(f"layers {brief(text)}: END must be greater than START (END is not included)")
            layers = range(start, end)
        else:
            layers = [whole_number(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"layers {brief(text)}: all, START..END or a comma list like 0,3,7 was expected") from None
    # A range of billions is refused by its ends, not walked through.
    ends = (layers[0], layers[-1]) if isinstance(layers, range) else layers
    if min(ends) < 0 or max(ends) >= count:
        raise UserError(f"layers {brief(text)}: this model has layers 0 to {count - 1}, that is 0..{count}")
    return tuple(sorted(set(layers)))


def parse_positions(text: str | None, count: int) -> tuple[int, ...] | str | None:
    """None (the contract's default), `all`, or the positions that `last` or a comma list names, for `count` tokens."""
    if text is None or text.strip().lower() == "all":
        return None if text is None else "all"
    if text.strip().lower() == "last":
        return (count - 1,)
    try:
        positions = [whole_number(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"positions {brief(text)}: all, last or a comma list like 5,6 was expected") from None
    if outside := [p for p in positions if not 0 <= p < count]:
        raise UserError(f"positions {outside} lie outside the prompt, which has positions 0 to {count - 1}")
    return tuple(sorted(set(positions)))


@dataclass(frozen=True)
class Selection:
    """Stages × layers × positions of one dump of `count` tokens."""

    config: Config
    count: int
    stages: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | str | None = None

    def wants(self, layer: int | None, stage: str) -> bool:
        """Whether this stage is written at this layer; whole-model stages ignore the layers."""
        return stage in self.stages and (layer is None or layer in self.layers)

    def rows(self, stage: Stage) -> tuple[int, ...] | None:
        """The query positions that are written; None for all of them."""
        if isinstance(self.positions, tuple):
            return self.positions
        return (self.count - 1,) if stage.last and self.positions is None else None

    def keys(self) -> list[Key]:
        """What is written, in computation order."""
        return [key for key in keys_of(self.config) if self.wants(*key)]

    def shape(self, stage: Stage) -> tuple[int, ...]:
        """The shape of the file of this stage."""
        rows = self.rows(stage)
        return stage.shape(self.config, self.count, None if rows is None else len(rows))

    def depth(self) -> int:
        """How many layers must be computed."""
        keys = self.keys()
        if any(layer is None for layer, _ in keys):
            return self.config.num_hidden_layers
        return max((layer for layer, _ in keys if layer is not None), default=-1) + 1

    def size(self, itemsize: int = 4) -> int:
        """Bytes of all tensors, without headers."""
        return itemsize * sum(math.prod(self.shape(STAGES[name])) for _, name in self.keys())


def select(
    config: Config, count: int, stages: str = "all", layers: str = "all", positions: str | None = None
) -> Selection:
    """What people name of a run of `count` tokens. Raises `UserError` where the model has none such."""
    return Selection(
        config,
        count,
        parse_stages(stages, config),
        parse_layers(layers, config.num_hidden_layers),
        parse_positions(positions, count),
    )


def take_rows(value: np.ndarray, stage: Stage, rows: tuple[int, ...] | None, first: int = 0) -> np.ndarray:
    """The wanted query rows of a block that begins at row `first`."""
    if rows is None:
        return value
    end = first + value.shape[stage.row_axis]
    return np.take(value, [row - first for row in rows if first <= row < end], axis=stage.row_axis)
