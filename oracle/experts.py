"""Mixtures of experts: the chosen ones compared as sets, their insides in the reference's order, near ties allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from jaxref.stages import STAGES, Key
from oracle.layouts import Pair, View

INDICES, LOGITS, WEIGHTS = "moe_router_indices", "moe_router_logits", "moe_router"
INSIDE = ("moe_expert_gate", "moe_expert_up", "moe_expert_swigl", "moe_expert_out")
# Two experts tie where their logits are nearer than this many times what the router is off anyway ...
TIE_ERRORS = 2.0
# ... or, where the test has no logits, than this many ulp of the test's dtype at the largest logit.
TIE_ULPS = 16.0


@dataclass(frozen=True)
class Choice:
    """Which experts the test chose at each common position, against the reference's [positions, A]."""

    positions: tuple[int, ...]
    order: np.ndarray  # [positions, A]: for each of the reference's ranks, the test's
    matched: np.ndarray  # [positions, A]: whether the test chose that expert at all
    faults: list[dict[str, int]] = field(default_factory=list)  # experts swapped that were no near tie
    ties: list[dict[str, int]] = field(default_factory=list)  # experts swapped at a near tie

    @property
    def reordered(self) -> bool:
        """Whether some position has the same experts in another order."""
        return bool((self.order != np.arange(self.order.shape[1])).any())


def choose(pairs: Mapping[str, Pair], epsilon: float) -> Choice:
    """Match the test's experts with the reference's, one position at a time.

    `pairs` holds moe_router_indices and, where there are any, moe_router_logits and moe_router of the layer; `epsilon`
    is the spacing of the test's dtype at 1.
    """
    pair = pairs[INDICES]
    positions = pair.positions
    ours, theirs = (_rows(side, positions) for side in (pair.reference, pair.test))
    choice = Choice(positions, np.zeros(ours.shape, np.int64), np.zeros(ours.shape, bool))
    for row, position in enumerate(positions):
        pairing, matched = _match(ours[row], theirs[row])
        choice.order[row], choice.matched[row] = pairing, matched
        for rank in np.flatnonzero(~matched):
            wanted, taken = int(ours[row, rank]), int(theirs[row, pairing[rank]])
            swap = {"token": position, "reference": wanted, "test": taken}
            near = _near(pairs, position, (wanted, taken), (int(rank), int(pairing[rank])), epsilon)
            (choice.ties if near else choice.faults).append(swap)
    return choice


def _rows(view: View, positions: tuple[int, ...]) -> np.ndarray:
    """Rows [positions, columns] of a small stage; ids that are no whole numbers become -1."""
    place = {position: row for row, position in enumerate(view.positions)}
    values = np.asarray(view.values[0, [place[p] for p in positions]], np.float64)
    return np.where(np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < 1 << 31), values, -1)


def _match(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of our ranks one of theirs: the same expert, or one of those left over, in order."""
    free = list(range(len(theirs)))
    pairing = np.full(len(ours), -1)
    for rank, expert in enumerate(ours):
        same = next((place for place in free if theirs[place] == expert), None)
        if same is not None and expert >= 0:
            pairing[rank] = same
            free.remove(same)
    matched = pairing >= 0
    pairing[~matched] = free
    return pairing, matched


def _near(
    pairs: Mapping[str, Pair], position: int, experts: tuple[int, int], ranks: tuple[int, int], epsilon: float
) -> bool:
    """Whether two experts were so close in the reference that rounding decides between them."""
    if LOGITS in pairs and position in pairs[LOGITS].reference.positions:
        pair = pairs[LOGITS]
        logits = _values(pair.reference, position)
        if not all(0 <= expert < logits.size for expert in experts):
            return False
        margin = abs(logits[experts[0]] - logits[experts[1]])
        noise = TIE_ULPS * epsilon * np.abs(logits).max()
        if position in pair.test.positions:
            # A router that is wrong altogether would make a tie of anything: its error counts no more than the noise.
            error = np.abs(_values(pair.test, position) - logits)[list(experts)].max()
            noise = min(noise, TIE_ERRORS * error + epsilon * np.abs(logits).max())
        return bool(margin <= noise)
    if WEIGHTS in pairs and position in pairs[WEIGHTS].positions:
        pair = pairs[WEIGHTS]
        ours, theirs = (
            _values(side, position)[rank] for side, rank in zip((pair.reference, pair.test), ranks, strict=True)
        )
        return bool(abs(ours - theirs) <= TIE_ULPS * epsilon * max(abs(ours), abs(theirs)))
    return False


def _values(view: View, position: int) -> np.ndarray:
    return np.asarray(view.values[0, view.positions.index(position)], np.float64)


def _ordered(pair: Pair, choice: Choice) -> Pair:
    """A stage inside the experts, or their weights, with the test's experts in the reference's order."""
    place = {position: row for row, position in enumerate(choice.positions)}
    if not set(pair.positions) <= set(place):
        return pair  # no indices at these positions: taken as they come
    rows = [place[position] for position in pair.positions]
    order = np.tile(np.arange(choice.order.shape[1]), (len(pair.test.positions), 1))
    for row, position in enumerate(pair.test.positions):
        if position in place:
            order[row] = choice.order[place[position]]
    matched = None if choice.matched[rows].all() or pair.stage.name == WEIGHTS else choice.matched[rows]
    return replace(pair, test=replace(pair.test, order=order), matched=matched)


class Choices:
    """What every tree's routers chose, layer by layer; `count` positions, `layers` layers."""

    RULE = "the same experts, but for near ties"

    def __init__(self, count: int, layers: int) -> None:
        self._count, self._layers = count, layers
        self._of: dict[tuple[str, int], Choice] = {}  # (role, layer)

    def add(self, role: str, layer: int, pairs: Mapping[str, Pair], epsilon: float) -> None:
        """Match the experts of one layer, after those of the layers before it."""
        choice = choose(pairs, epsilon)
        # At tokens for which another expert ran before, a router may choose others without being wrong.
        tied = self.tied((layer, INDICES))
        forgiven = [swap for swap in choice.faults if swap["token"] in tied]
        faults = [swap for swap in choice.faults if swap["token"] not in tied]
        self._of[role, layer] = replace(choice, faults=faults, ties=choice.ties + forgiven)

    def ordered(self, pair: Pair, role: str, layer: int | None) -> Pair:
        """The pair with its experts in the reference's order, where the stage has experts side by side."""
        choice = self._of.get((role, layer)) if layer is not None else None
        return _ordered(pair, choice) if choice and pair.stage.name in (*INSIDE, WEIGHTS, INDICES) else pair

    def tied(self, key: Key) -> set[int]:
        """Positions whose values may differ because another expert ran before this stage, by a near tie.

        In the same layer that is the token itself, in later layers every token that attends to it.
        """
        layer = self._layers if key[0] is None else key[0]
        order = [*STAGES]
        after_experts = order.index(key[1]) > order.index(INSIDE[-1])
        found: set[int] = set()
        for (_, at), choice in self._of.items():
            tokens = {tie["token"] for tie in choice.ties}
            if at < layer and tokens:
                found |= set(range(min(tokens), self._count))
            elif at == layer and after_experts:
                found |= tokens
        return found

    def unseen(self) -> bool:
        """Whether some position's experts are not in the trees."""
        return any(len(choice.positions) < self._count for choice in self._of.values())

    def judged(self, layer: int | None) -> tuple[str | None, list[str]]:
        """The test's choice in one layer: what is wrong with it (None: nothing), and notes."""
        choice = self._of.get(("test", layer)) if layer is not None else None
        if choice is None:
            return "the experts could not be matched", []
        wrong = "token {token}: expert {reference} in the reference, {test} in the test"
        near = "near tie at token {token}: experts {reference} and {test} swapped"
        notes = [near.format(**swap) for swap in choice.ties]
        notes += ["the same experts in another order"] if choice.reordered and not choice.faults else []
        return "; ".join(wrong.format(**swap) for swap in choice.faults[:4]) or None, notes


def only(pair: Pair, positions: set[int]) -> Pair:
    """The pair at some of its positions."""
    return replace(pair, positions=tuple(p for p in pair.positions if p in positions))
