"""A tree of named tensors for notebooks and tests, by layer and stage as `jaxref.forward` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxref.named import Named
from jaxref.stages import ALIASES, STAGES
from weights import UserError

_ORDER = {name: place for place, name in enumerate(STAGES)}
Open = Callable[[], Named]


class NotThere(UserError, KeyError):
    """A layer or stage that the tree does not hold; a `KeyError` too, so that `in` and `get` work."""

    __str__ = Exception.__str__


class NamedLayer(Mapping[str, Named]):
    """The stages of one layer, or of the whole model, in computation order; a tensor is opened when it is asked for.

    `where` is how messages call it.
    """

    def __init__(self, where: str, stages: Mapping[str, Open]) -> None:
        self._where = where
        self._stages = {name: stages[name] for name in sorted(stages, key=lambda n: (_ORDER.get(n, len(_ORDER)), n))}

    def __getitem__(self, stage: str) -> Named:
        name = canonical(stage)
        if name not in self._stages:
            raise NotThere(f"{self._where} has no stage {stage!r}; it has {', '.join(self._stages)}")
        return self._stages[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __repr__(self) -> str:
        return "\n".join(repr(self[name]) for name in self)


class NamedTree(Mapping[str, NamedLayer | Named]):
    """A tree by the paths of `jaxref.forward`: `["layer-3"]["attn_norm"]`, `["lm_head"]`; also `["layer-3/attn_norm"]`.

    `place` is how messages call it; `manifest` says whose it is, and is None where its producer writes none. `stages`
    are by layer, None for the whole model's. `path` is where it lies on the disk, if it does.
    """

    def __init__(
        self,
        place: str,
        manifest: dict[str, Any] | None,
        stages: Mapping[int | None, Mapping[str, Open]],
        path: Path | None = None,
    ) -> None:
        self._place, self.manifest, self.path = place, manifest, path
        layers = sorted(index for index in stages if index is not None)
        self._layers = {f"layer-{n}": NamedLayer(f"{place}: layer-{n}", stages[n]) for n in layers if stages[n]}
        self._whole = NamedLayer(f"{place}: the whole model", stages.get(None, {}))

    def __getitem__(self, name: str) -> Any:
        layer, slash, stage = name.partition("/")
        if slash:
            return self[layer][stage]
        if layer in self._layers:
            return self._layers[layer]
        if canonical(name) in self._whole:
            return self._whole[name]
        raise NotThere(f"{self._place}: no {name!r}; it has {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        yield from self._layers
        yield from self._whole

    def __len__(self) -> int:
        return len(self._layers) + len(self._whole)

    def __repr__(self) -> str:
        known = self.manifest or {}
        facts = [str(known[key]) for key in ("producer", "model", "dtype") if key in known] or ["no manifest"]
        facts += [f"{len(tokens)} tokens"] if (tokens := known.get("tokens")) else []
        count = sum(map(len, self._layers.values())) + len(self._whole)
        names = [*self._layers]
        names = names if len(names) < 4 else [names[0], "…", names[-1]]
        return f"{self._place}: {', '.join(facts)}; {count} stages: {', '.join([*names, *self._whole])}"


def canonical(stage: str) -> str:
    """A stage's name in the table, or what was given in lower case."""
    lowered = stage.strip().lower()
    return ALIASES.get(lowered, lowered)
