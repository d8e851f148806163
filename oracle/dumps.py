"""Dumps that are not what the next stage used: of a buffer that was changed in place, or taken at another point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from jaxref.stages import Key
from oracle.case import Case, narrowed
from oracle.engine_tree import Value
from oracle.local import Local
from oracle.replay import Replay
from oracle.trees import path_of

# So many wrong inputs of one stage are taken in all combinations; no stage reads more.
MOST = 3


class Dumps:
    """Computes what faulty stages should be, and finds stages that are right on that, though not on what was dumped.

    Such a stage is no fault: the dump of its input is. A stage that uses a wrong input is right on the dump.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self._layer: int | None = -1
        self._computed: dict[Key, list[Value]] = {}

    def enter(self, layer: int | None) -> None:
        """Go on to a layer (None: the whole model); only the hidden state before it is still needed."""
        if layer != self._layer:
            hidden = ("post_ffn_residual", "embedding")
            self._computed = {key: values for key, values in self._computed.items() if key[1] in hidden}
            self._layer = layer

    def remember(self, case: Case, exact: np.ndarray) -> None:
        """Keep what a faulty stage should be: on its inputs as dumped, and on what they should be themselves."""
        values = [_value(case, exact)]
        computed = {key: self._computed[key][-1] for key in self._wrong(case.key)}
        if computed and (other := self._case(case, computed)) is not None:
            values.append(_value(other, self.replay.exact(other)))
        self._computed[case.key] = values

    def right(self, case: Case, judge: Callable[[Case], Local]) -> Local | None:
        """The row of a stage that is right once some of its inputs are what they should be; None where there is none.

        `judge` gives the engine's row on other inputs. `past` of the one that is returned has the inputs' names.
        """
        for computed in self._choices(case.key):
            other = self._case(case, computed)
            if other is None:
                continue
            row = judge(other)
            if not row.faulty:
                past = tuple(name for name in other.through if name not in case.through)
                return replace(row, through=case.through, past=past)
        return None

    def _choices(self, key: Key) -> Iterator[dict[Key, Value]]:
        """Some wrong inputs, each as one of what it should be; few of them come first."""
        wrong = self._wrong(key)[:MOST]
        options: list[list[Value | None]] = [[None, *self._computed[name]] for name in wrong]
        found = [
            {name: value for name, value in zip(wrong, values, strict=True) if value is not None}
            for values in product(*options)
        ]
        yield from sorted(filter(None, found), key=len)

    def _wrong(self, key: Key) -> list[Key]:
        """The faulty stages that this one is computed from, through those that the tree lacks."""
        found: list[Key] = []
        for name in self.replay.upstream(key):
            if isinstance(name, str):
                continue
            if name in self._computed:
                found.append(name)
            elif name not in self.replay.engine.tree.files and name[0] == key[0]:
                found += self._wrong(name)
        return list(dict.fromkeys(found))

    def _case(self, case: Case, computed: dict[Key, Value]) -> Case | None:
        other = self.replay.case(case.key, computed)
        if not isinstance(other, Case) or not set(case.positions) <= set(other.positions):
            return None
        return narrowed(other, case.positions)


def _value(case: Case, exact: np.ndarray) -> Value:
    return Value(exact, case.positions, tuple(dict.fromkeys((*case.through, path_of(case.key)))))
