"""When is a difference a fault? Rules that people write, bounds by dtype, and a third tree as the yardstick."""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxref.stages import STAGES, Key
from oracle.metrics import PRECISION, Figures
from oracle.trees import path_of
from weights import UserError
from weights.errors import brief, plain

# Greatest relative L2 (and channel median) of a two-way compare; see docs/decisions.md for what was measured.
BOUNDS = {"float64": 1e-6, "float32": 3e-5, "float16": 0.03, "q8": 0.1, "bfloat16": 0.15}
# A softmax's relative error is the absolute error of its scores, and `attention` inherits it.
STEEP = 4.0
STEEP_STAGES = ("attn_softmax", "attention", "attn_out")
# Before the first attention nothing is inherited yet.
FRESH = 0.25
FRESH_STAGES = ("embedding", "attn_norm", "qkv_matmul", "qkv_bias")
# The least error that a yardstick is taken to have, in ulp of its dtype: below it, ratios say nothing.
FLOOR_ULPS = 1.0
MAX_RATIO = 2.0
# An error of fewer values than this is luck: the ratio may be greater by √(FEW/values), and the yardstick's error is
# taken to be at least that of the stage before.
FEW = 256
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
class Rules:
    """What is asked of every stage. `dtype` is the test's, `coarser` that of the pair, which decides the bounds.

    An engine that rounds activations before it multiplies is as coarse as these ("q8" for quantised weights).
    """

    dtype: str
    coarser: str
    tolerances: tuple[Tolerance, ...] = ()
    min_cosine: float | None = None
    max_ratio: float = MAX_RATIO
    positions: int = 1  # tokens of the prompt

    def __post_init__(self) -> None:
        for name, value in (("max-ratio", self.max_ratio), ("min-cosine", self.min_cosine)):
            if value is not None and math.isnan(value):  # which every error would pass, or none
                raise UserError(f"{name}: a number was expected, not nan")

    @property
    def epsilon(self) -> float:
        """The spacing of the test's dtype at 1, or of the float32 that files hold."""
        return max(2.0 ** -PRECISION[self.coarser][0], 2.0**-23)

    @property
    def floor(self) -> float:
        """The least error that the yardstick is taken to have."""
        return FLOOR_ULPS * self.epsilon

    def bound(self, key: Key) -> float:
        """The greatest relative L2 (and channel median) of a stage when nothing else is said."""
        layer, stage = key
        if layer == 0 and stage in FRESH_STAGES:
            return BOUNDS[self.coarser] * FRESH
        # RoPE's angles are float32 in all but float64: at position p they are off by about p·2⁻²⁴ radians.
        angles = 0.0 if self.coarser == "float64" else self.positions * 2.0**-24
        return (BOUNDS[self.coarser] + angles) * (STEEP if stage in STEEP_STAGES else 1.0)

    def written(self, key: Key) -> Tolerance | None:
        """The first rule of the user's that is about this stage."""
        own = next((rule for rule in self.tolerances if rule.covers(key)), None)
        if own is None and self.min_cosine is not None:
            text = f"cosine >= {self.min_cosine:g}"
            return Tolerance(text, re.compile(".*"), (("cosine", ">=", self.min_cosine),))
        return own


def coarser_of(first: str, second: str) -> str:
    """Of two dtypes the one with fewer bits of mantissa."""
    return max(first, second, key=lambda dtype: -PRECISION[dtype][0])


@dataclass(frozen=True)
class Judgement:
    """`fault` says in words why a stage fails (None: it agrees); `blame` is set where the figures alone tell."""

    rule: str
    fault: str | None = None
    ratio: float | None = None
    blame: str | None = None


@dataclass(frozen=True)
class Yardstick:
    """What rounding alone does to a stage: a third tree's distance from the reference, and from the test if needed.

    `before` is its figures at the stage before, in the same layer.
    """

    figures: Figures
    from_test: Figures | None = None
    before: Figures | None = None

    def ratio(self, test: Figures, rules: Rules) -> float:
        """The test's error over the yardstick's: the worse of the relative L2 and of the median over channels."""
        return max(self._ratio(test, rules, name) for name in ("relative_l2", "channel_median"))

    def _ratio(self, test: Figures, rules: Rules, name: str) -> float:
        error = max(getattr(self.figures, name), rules.floor)
        if self.before is not None and test.count < FEW:
            error = max(error, getattr(self.before, name))
        return getattr(test, name) / error


def judge(key: Key, test: Figures, hf: Yardstick | None, rules: Rules) -> Judgement:
    """One stage of one layer: `test` is the distance from the reference that is judged."""
    if fault := _not_finite(test, hf.figures if hf else None):
        return Judgement("finite where the reference is", fault, blame="test")
    ratio = hf.ratio(test, rules) if hf else None
    if own := rules.written(key):
        return Judgement(own.text, own.failing(test), ratio)
    bound, worst = rules.bound(key), max(test.relative_l2, test.channel_median)
    if hf is None or ratio is None:
        fault = None if worst <= bound else f"relative L2 {worst:.3g}, over {bound:.3g}"
        return Judgement(f"relative L2 <= {bound:.3g}", fault)
    limit = rules.max_ratio * max(1.0, math.sqrt(FEW / test.count))
    rule = f"error <= {limit:.3g} x the yardstick's"
    if ratio > limit:
        return Judgement(rule, f"{ratio:.3g} times the yardstick's error", ratio)
    if worst > bound and hf.from_test is not None and hf.from_test.relative_l2 < worst / 2:
        words = "test and yardstick agree with each other and not with the reference"
        return Judgement(rule, f"{words}: relative L2 {worst:.3g}, over {bound:.3g}", ratio, "reference")
    return Judgement(rule, None, ratio)


def _not_finite(test: Figures, yardstick: Figures | None) -> str | None:
    # Where the yardstick overflows as well, that is the dtype's doing.
    if test.mismatched > (yardstick.mismatched if yardstick else 0):
        many = "1 value is" if test.mismatched == 1 else f"{test.mismatched} values are"
        return f"{many} NaN or infinite in one of the two only"
    return None if test.count else "no value is finite in both"


@dataclass(frozen=True)
class Blame:
    """Who is the odd one out at the first divergence: "test", "hf", "reference" or "none", and why."""

    who: str
    words: str


def odd_one_out(test_ref: float, hf_ref: float, test_hf: float, rules: Rules, key: Key) -> Blame:
    """By all three distances (relative L2): the one that is far from both others, which are near to each other."""
    distances = f"test-reference {test_ref:.2g}, hf-reference {hf_ref:.2g}, test-hf {test_hf:.2g}"
    noise = f"nobody: inside the rounding noise of {rules.coarser}"
    if max(test_ref, hf_ref) <= rules.bound(key) and test_ref <= rules.max_ratio * max(hf_ref, rules.floor):
        return Blame("none", f"{noise} ({distances})")
    # In the order of trust: the odd one is the one outside the nearest pair.
    near = min((hf_ref, "test"), (test_ref, "hf"), (test_hf, "reference"))
    others = sorted((test_ref, hf_ref, test_hf))[1]
    if others > 2 * max(near[0], rules.floor):
        return Blame(near[1], f"{near[1]}: far from both others, which agree ({distances})")
    if test_ref > rules.max_ratio * max(hf_ref, rules.floor):
        return Blame("test", f"test: farther from the reference than hf is ({distances})")
    return Blame("none", f"nobody can be told: all three differ ({distances})")


def check_dtype(dtype: str | None) -> str | None:
    """Raise `UserError` for a dtype that is not known."""
    if dtype is not None and dtype not in BOUNDS:
        raise UserError(f"dtype {dtype!r} is not known; known are {', '.join(BOUNDS)}")
    return dtype


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
