"""Forty dumps in one process; `python -m tests.endurance.soak` makes two hundred."""

from __future__ import annotations

from tests.endurance.soak import soak


def test_nothing_grows() -> None:
    before, after = soak(dumps=40, warm=12, judged=8)
    # Memory still settles by some megabytes; one layer's parameters kept by each dump would be 60 and more.
    assert before.grown(after, most=25_000_000) == []
