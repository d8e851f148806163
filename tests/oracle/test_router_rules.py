"""The mistakes of routers: each is told from the right choice and from the others; what is none of them has no name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oracle.case import INDICES, Case
from oracle.explain import explain
from oracle.router_rules import rules
from oracle.routing import TIE, rule_of
from tests.conftest import prompt
from tests.oracle.standin import run, write
from tests.oracle.standin.planted import Planted
from tests.oracle.sweep import Models

LOGITS = np.random.default_rng(5).normal(size=(23, 16)) * 3
COUNT = 4


def case(logits: np.ndarray) -> Case:
    return Case((2, INDICES), (logits,), tuple(range(len(logits))), None)


def test_each_mistake_is_told_from_the_others() -> None:
    for rule in rules(LOGITS, COUNT):
        name, words = rule_of(case(LOGITS), rule.chosen(COUNT), "float32") or ("", "")
        assert name == rule.name and ", or " not in words, (rule.name, words)


def test_the_right_choice_and_one_by_chance_have_no_name() -> None:
    right = np.argsort(-LOGITS, axis=1)[:, :COUNT]
    assert rule_of(case(LOGITS), right, "float32") is None
    by_chance = np.random.default_rng(0).permuted(np.tile(np.arange(16), (23, 1)), axis=1)[:, :COUNT]
    assert rule_of(case(LOGITS), by_chance, "float32") is None
    almost = np.argsort(LOGITS, axis=1)[:, :COUNT]
    almost[7] = right[7]
    assert rule_of(case(LOGITS), almost, "float32") is None


@pytest.mark.parametrize("wrong", [16.0, -1.0, 1.5, np.nan])
def test_what_is_no_expert_has_no_name(wrong: float) -> None:
    ids = np.argsort(LOGITS, axis=1)[:, :COUNT].astype(float)
    ids[3, 1] = wrong
    assert rule_of(case(LOGITS), ids, "float32") is None


def test_no_ids_at_all_have_no_name() -> None:
    assert rule_of(case(LOGITS), np.zeros((23, 0)), "float32") is None


def test_a_near_tie_does_not_hide_a_mistake() -> None:
    logits = LOGITS.copy()
    order = np.argsort(logits[0])
    logits[0, order[3]] = logits[0, order[4]] - TIE["float16"] * np.abs(logits[0]).max() / 2
    ids = np.argsort(logits, axis=1)[:, :COUNT]
    ids[0, 3] = order[4]  # as good, in float16
    assert (rule_of(case(logits), ids, "float16") or ("",))[0] == "smallest"
    assert rule_of(case(logits), ids, "float32") is None


def test_mistakes_that_come_to_the_same_are_all_said() -> None:
    negative = -np.abs(LOGITS)
    name, words = rule_of(case(negative), np.argsort(negative, axis=1)[:, :COUNT], "float32") or ("", "")
    assert name == "smallest"
    assert words == "the experts with the smallest logits, or the experts with the largest absolute logits"


def test_a_choice_by_chance_is_followed_by_its_weights(tmp_path: Path) -> None:
    """The ids have no cause, but the weights do: they are those of the experts that were chosen."""
    raw, weights, checkpoint = Models(tmp_path).get("qwen3_moe", Planted("", ()))
    tokens = prompt(23, checkpoint.config.vocab_size)
    trace = run(raw, weights, tokens, "float32", {"router_choice/by chance": {2}})
    write(tmp_path / "tree", trace)
    causes = {cause.stage: cause.explanation for cause in explain(checkpoint, tmp_path / "tree", tokens).causes}
    assert list(causes) == ["moe_router", INDICES] and causes[INDICES] is None
    assert causes["moe_router"] is not None and causes["moe_router"].parameter == "written"
