"""Which experts an engine may choose in place of those with the largest logits: the mistakes that routers make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

# Groups of experts, of which so many are kept: what DeepSeek's routers do, and code that was written for them.
GROUPS, KEPT = (2, 4, 8, 16), (1, 2, 3, 4)


@dataclass(frozen=True)
class Rule:
    """Those experts of each token that have the largest `scores` [rows, E], in an `order` by them, or by id."""

    name: str
    words: str
    scores: np.ndarray
    order: str = "descending"  # or "ascending", "by id"

    def chosen(self, count: int) -> np.ndarray:
        """The ids [rows, count]."""
        best = np.argsort(-self.scores, axis=1, kind="stable")[:, :count]
        return {"descending": best, "ascending": best[:, ::-1], "by id": np.sort(best, axis=1)}[self.order]

    def misses(self, ids: np.ndarray, tie: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At which rows these ids [rows, A] are others, and where the right ones stand in another order.

        Scores nearer than `tie` [rows, 1] are alike.
        """
        own = np.take_along_axis(self.scores, ids, axis=1)
        least = -np.sort(-self.scores, axis=1)[:, ids.shape[1] - 1 : ids.shape[1]]
        repeated = np.array([len(set(row)) < len(row) for row in ids.tolist()])
        wrong = ~(own >= least - tie).all(axis=1) | repeated
        with np.errstate(invalid="ignore"):
            steps = np.diff(own, axis=1)
        falls = {"descending": steps > tie, "ascending": -steps > tie, "by id": np.diff(ids, axis=1) <= 0}
        return wrong, falls[self.order].any(axis=1) & ~wrong

    def fits(self, ids: np.ndarray, tie: np.ndarray) -> bool:
        """Whether these ids [rows, A] are its own, but for near ties."""
        return not any(rows.any() for rows in self.misses(ids, tie))


def rules(logits: np.ndarray, count: int) -> Iterator[Rule]:
    """The wrong ways to choose `count` experts by a router's finite logits [rows, E]."""
    yield Rule("smallest", "the experts with the smallest logits", -logits)
    yield Rule("absolute", "the experts with the largest absolute logits", np.abs(logits))
    best = logits.argmax(axis=1)[:, None]
    without_best = np.where(np.arange(logits.shape[1]) == best, -np.inf, logits)
    if count < logits.shape[1]:
        yield Rule("second", "the experts from the second best on", without_best)
    for step in (1, -1):
        yield Rule(f"{step:+d}", f"experts whose ids are off by {step:+d}", np.roll(logits, step, axis=1))
    if len(logits) > 1:
        over_tokens = logits - logsumexp(logits, axis=0)
        yield Rule("over tokens", "experts by a softmax over the tokens, not over the experts", over_tokens)
        yield Rule("all 0", "the first token's experts at every token", np.broadcast_to(logits[0], logits.shape))
        yield Rule("all -1", "the last token's experts at every token", np.broadcast_to(logits[-1], logits.shape))
        turned = logits.reshape(logits.shape[::-1]).T
        yield Rule("transposed", "experts by logits that are read as [experts, tokens]", turned)
    yield from _grouped(logits, count)
    yield Rule("ascending", "the right experts by ascending weight", logits, "ascending")
    yield Rule("by id", "the right experts by ascending id", logits, "by id")


def _grouped(logits: np.ndarray, count: int) -> Iterator[Rule]:
    """The best experts of the best groups: a group is as good as its best one (arXiv:2405.04434), or two of them
    (arXiv:2412.19437).
    """
    rows, experts = logits.shape
    for groups in (n for n in GROUPS if experts % n == 0 and experts > n):
        by_group = np.sort(logits.reshape(rows, groups, -1), axis=2)
        for kept in (n for n in KEPT if n < groups and n * experts >= count * groups):
            # By their best ones, as many groups as experts are wanted hold them all: nothing would be wrong.
            for most in (1, 2) if kept < count else (2,):
                good = by_group[:, :, -most:].sum(axis=2)
                wanted = np.argsort(-good, axis=1, kind="stable")[:, :kept]
                inside = (np.arange(groups) == wanted[..., None]).any(axis=1).repeat(experts // groups, axis=1)
                how = "best expert" if most == 1 else "two best experts"
                words = f"experts of {kept} of {groups} groups alone, by each group's {how}"
                yield Rule(f"{kept} of {groups} by {most}", words, np.where(inside, logits, -np.inf))
