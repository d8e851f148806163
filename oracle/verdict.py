"""When is a difference a fault? Rules that people write, bounds by dtype, and a third tree as the yardstick."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxref.stages import Key
from oracle.metrics import PRECISION, Figures
from oracle.tolerances import Tolerance
from weights import UserError

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
    width: int = 1  # terms of the model's longest sum in a product

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
        """The least error that the yardstick is taken to have.

        In float32 products are summed in float32, and n terms in another order are off by about √n of its rounding.
        """
        sums = 2.0**-24 * math.sqrt(self.width) if self.coarser == "float32" else 0.0
        return max(FLOOR_ULPS * self.epsilon, sums)

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
