"""What the catalogue says of one fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.oracle.standin.place import Trace

EVERY = ("qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, eq=False)
class Planted:
    """One fault. Its name is `cause`, `cause/variant`, or `cause/where/parameter`.

    `stages` are those whose output is wrong for their inputs as written, as far as the layer has them; all others are
    right for theirs.
    """

    name: str
    stages: tuple[str, ...]
    parameter: float | str | None = None  # what an explanation should find beside the cause
    archs: tuple[str, ...] = EVERY
    config: Mapping[str, Any] = field(default_factory=dict)  # changes of `tiny_config` that it takes to show
    per_layer: bool = True  # False: once in the model, at its start or its end; plant it with None
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    named: bool = True  # False: no cause has a name for it, a hint is all that can be given
    weights: str = "float32"  # the type in which the checkpoint's weights must be exact

    @property
    def cause(self) -> str | None:
        """What an explanation should name."""
        return self.name.partition("/")[0] if self.named else None


def row(name: str, stages: str, parameter: float | str | None = None, **more: Any) -> Planted:
    """A row of the catalogue, its stages in one string."""
    return Planted(name, tuple(stages.split()), parameter, **more)


def hint(name: str, **more: Any) -> Planted:
    """Damage of the kind NAME/STAGE[/…], which has no cause."""
    return row(name, name.split("/")[1], named=False, **more)


def struck_stages(planted: Planted, trace: Trace, layer: int | None) -> list[tuple[int | None, str]]:
    """Where a fault planted in `layer` shows, as keys of the trace, in computation order.

    Of a fault that is not a layer's: where it shows in the model.
    """
    places = {layer} if planted.per_layer else {0, None}
    return [(place, stage) for place, stage in trace if place in places and stage in planted.stages]
