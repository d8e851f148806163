"""What people write about stages on a command line: tolerances, and stages that may be missing."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxref.stages import STAGES, Key
from oracle.metrics import Figures
from oracle.trees import path_of
from weights import UserError
from weights.errors import brief, plain

FIGURES = ("relative_l2", "cosine", "max_abs", "rms", "snr_db", "ulp_median", "ulp_max", "channel_median")
LOGIT_FIGURES = ("kl", "top1", "top10")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_PREDICATE = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Tolerance:
    """`stage:value` (greatest relative L2) or `regex:predicate`, which is met for a stage's or a file's whole name."""

    text: str
    pattern: re.Pattern[str]
    terms: tuple[tuple[str, str, float], ...]  # (figure, operator, number), all of which must hold

    def covers(self, key: Key) -> bool:
        """Whether the rule is about this stage, by its name or as `layer-3/name`."""
        return any(self.pattern.fullmatch(name) for name in (key[1], path_of(key)))

    def failing(self, figures: Figures) -> str | None:
        """The first term that does not hold, in words; None where all hold."""
        for name, sign, number in self.terms:
            value = getattr(figures, name)
            if value is None:
                return f"{name} is not known here"
            if not _OPERATORS[sign](value, number) and not figures.equal:
                return f"{name} {value:.6g}, not {sign} {number:g}"
        return None


def parse_tolerance(text: str) -> Tolerance:
    """`attn_softmax:0.05`, `ffn_.*:cosine>=0.999`, `layer-3/.*:max_abs<0.1 and rms<0.01`. Raises `UserError`."""
    name, colon, rule = text.rpartition(":")
    if not colon or not name.strip() or not rule.strip():
        raise UserError(f"tolerance {brief(text)}: stage:value or regex:predicate was expected, like attn_out:0.01")
    pattern = _compiled(name.strip(), f"tolerance {brief(text)}")
    # A misspelled stage would otherwise be a rule that never applies.
    if re.fullmatch(r"\w+", name.strip()) and name.strip() not in STAGES:
        raise UserError(f"tolerance {brief(text)}: unknown stage {brief(name.strip())}; stages are {', '.join(STAGES)}")
    return Tolerance(text, pattern, _terms(rule, text))


def _terms(rule: str, text: str) -> tuple[tuple[str, str, float], ...]:
    try:
        value = float(rule)
    except ValueError:
        return tuple(_term(part, text) for part in re.split(r"\s+and\s+|,", rule))
    if not value >= 0:
        raise UserError(f"tolerance {brief(text)}: a number from 0 on was expected")
    return (("relative_l2", "<=", value),)


def _term(part: str, text: str) -> tuple[str, str, float]:
    known = ", ".join(FIGURES + LOGIT_FIGURES)
    found = _PREDICATE.fullmatch(part)
    if not found or found[1] not in FIGURES + LOGIT_FIGURES:
        what = brief(part.strip())
        raise UserError(f"tolerance {brief(text)}: {what} is no predicate; like cosine>=0.999, of {known}")
    try:
        return found[1], found[2], float(found[3])
    except ValueError:
        raise UserError(f"tolerance {brief(text)}: {brief(found[3])} is no number") from None


@dataclass(frozen=True)
class Missing:
    """Stages that may be missing, each pattern met for a stage's whole name, or for `layer-3/name`."""

    patterns: tuple[re.Pattern[str], ...]

    def fullmatch(self, name: str) -> bool:
        """Whether one of the patterns is met."""
        return any(pattern.fullmatch(name) for pattern in self.patterns)

    def covers(self, key: Key) -> bool:
        """Whether this stage may be missing."""
        return self.fullmatch(key[1]) or self.fullmatch(path_of(key))

    def idle(self, keys: Iterable[Key]) -> list[str]:
        """The patterns that none of these stages meets: misspelled ones, most likely."""
        names = {name for key in keys for name in (key[1], path_of(key))}
        return [one.pattern for one in self.patterns if not any(one.fullmatch(name) for name in names)]


def compile_missing(patterns: Sequence[str]) -> Missing | None:
    """The stages that may be missing. Raises `UserError` for what is no regular expression."""
    if not patterns:
        return None
    return Missing(tuple(_compiled(pattern, f"allow-missing {brief(pattern)}") for pattern in patterns))


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():  # of Python's, on what a set may mean one day
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError, MemoryError) as error:  # of a count of any length
        raise UserError(f"{where}: {brief(pattern)} is no regular expression: {plain(error)}") from None
