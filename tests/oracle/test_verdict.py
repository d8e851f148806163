"""Rules, ratios and blame, on figures made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oracle.metrics import Figures
from oracle.tolerances import parse_tolerance
from oracle.verdict import Rules, Yardstick, judge, odd_one_out
from weights import UserError

RULES = Rules("float16", "float16")
KEY = (3, "attn_out")


def figures(error: float, **more) -> Figures:
    exact = Figures(5000, error, 1 - error**2 / 2, error, error, 0.0, 1.0, 9.0, error, (0, 0, 0))
    return replace(exact, **more)


def fails(test: Figures, hf: Figures | None = None, rules: Rules = RULES, between: Figures | None = None) -> bool:
    return judge(KEY, test, Yardstick(hf, between) if hf else None, rules).fault is not None


def test_the_ratio_has_a_floor() -> None:
    assert not fails(figures(0.0), figures(0.0))
    assert judge(KEY, figures(0.0), Yardstick(figures(0.0)), RULES).ratio == 0
    assert not fails(figures(1.9 * 2**-10), figures(0.0))
    assert fails(figures(2.1 * 2**-10), figures(0.0))


def test_in_float32_the_floor_is_that_of_another_order_of_sums() -> None:
    """PyTorch's own sums on a processor with AVX-512, beside those of XLA; in half precision they count for nothing."""
    narrow, wide = (Rules("float32", "float32", width=width) for width in (1, 112))
    assert fails(figures(6.8e-7), figures(3.3e-7), narrow) and not fails(figures(6.8e-7), figures(3.3e-7), wide)
    assert wide.floor == pytest.approx(112**0.5 * 2**-24) and fails(figures(2.1 * wide.floor), figures(0.0), wide)
    for dtype in ("float16", "bfloat16", "float64"):
        assert Rules(dtype, dtype, width=112).floor == Rules(dtype, dtype).floor


def test_twice_the_yardstick_is_the_limit() -> None:
    assert not fails(figures(0.0199), figures(0.01))
    assert fails(figures(0.0201), figures(0.01))
    assert not fails(figures(0.029), figures(0.01), replace(RULES, max_ratio=3))
    # The error of a few values is luck.
    assert not fails(figures(0.03, count=64), figures(0.01))
    assert fails(figures(0.05, count=64), figures(0.01))


def test_a_massive_channel_does_not_hide_a_fault() -> None:
    assert fails(figures(0.001, channel_median=0.1), figures(0.001))
    assert fails(figures(0.001, channel_median=0.2))


def test_a_wrong_reference_is_no_agreement() -> None:
    judged = judge(KEY, figures(0.5), Yardstick(figures(0.5), figures(0.01)), RULES)
    assert judged.fault and judged.blame == "reference"
    # Both far from the reference and from each other: that is noise.
    assert not fails(figures(0.2), figures(0.2), between=figures(0.28))


def test_nan_fails_whatever_the_rules_say() -> None:
    loose = replace(RULES, min_cosine=-1.0)
    assert fails(figures(0.0, mismatched=1), rules=loose)
    assert fails(figures(0.0, mismatched=2), figures(0.0, mismatched=1))
    assert not fails(figures(0.0, mismatched=2), figures(0.0, mismatched=2))
    assert fails(figures(0.0, count=0))


@pytest.mark.parametrize(
    ("text", "error", "bad"),
    [
        ("attn_out:0.1", 0.09, False),
        ("attn_out:0.1", 0.11, True),
        ("attn_.*:cosine>=0.999", 0.04, False),
        ("attn_.*:cosine>=0.999", 0.05, True),
        ("layer-3/.*:max_abs<0.1 and rms<0.01", 0.009, False),
        ("layer-3/.*:max_abs<0.1,rms<0.01", 0.011, True),
        ("layer-2/.*:0", 0.001, False),  # about another layer
        ("(?:ffn|attn)_out:ulp_max<=10", 0.5, False),
        (".*:kl<=1", 0.5, True),  # only logits have one
    ],
)
def test_tolerances(text: str, error: float, bad: bool) -> None:
    assert fails(figures(error), rules=replace(RULES, tolerances=(parse_tolerance(text),))) == bad


def test_the_first_rule_wins() -> None:
    rules = [parse_tolerance(text) for text in ("attn_out:1", ".*:0")]
    assert not fails(figures(0.5), rules=replace(RULES, tolerances=tuple(rules), min_cosine=0.9999))
    assert fails(figures(0.5), rules=replace(RULES, tolerances=tuple(rules[::-1])))
    assert fails(figures(0.05), rules=replace(RULES, min_cosine=0.999))


@pytest.mark.parametrize(
    "text",
    ["", "attn_out", "attn_out:", ":0.1", "atn_out:0.1", "a(:1", "attn_out:-1", "attn_out:nan", "attn_out:size<3"]
    + ["attn_out:cosine>=x", "attn_out:cosine=1", "attn_out:cosine>=1-e"],
)
def test_broken_tolerances(text: str) -> None:
    with pytest.raises(UserError):
        parse_tolerance(text)


@pytest.mark.parametrize(
    ("distances", "who"),
    [
        ((0.5, 0.002, 0.5), "test"),
        ((0.002, 0.5, 0.5), "hf"),
        ((0.5, 0.5, 0.002), "reference"),
        ((0.037, 0.037, 0.0), "none"),
        ((0.03, 0.03, 0.04), "none"),
        ((0.9, 1.0, 1.1), "none"),
    ],
)
def test_the_odd_one_out(distances: tuple[float, float, float], who: str) -> None:
    blame = odd_one_out(*distances, RULES, KEY)
    assert blame.who == who
    if max(distances) < 0.1:
        assert "inside the rounding noise of float16" in blame.words
