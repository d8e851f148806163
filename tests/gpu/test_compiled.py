"""What XLA's CUDA compiler makes for a card that need not be there; without the compiler these tests are skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.gpu.cards import CARDS
from tests.gpu.compiled import DTYPES, WHOLE
from tests.gpu.conftest import HAS_PLUGIN
from tests.test_cli import ROOT
from tests.test_devices import clean_environment
from tests.test_lowered import DOTS

pytestmark = pytest.mark.skipif(not HAS_PLUGIN, reason="XLA's CUDA compiler is in jaxref[cuda12], which is 5 GB")
CUBLAS = {"__cublas$gemm", "__cublas$lt$matmul"}
# Sorts and top-k, which XLA has of its own.
OTHERS = {"__cub$DeviceRadixSort", "__cub$DeviceRadixSortUnassignedScratchSize", "TopK", "__gpu$TopK"}


@pytest.fixture(scope="module", params=CARDS)
def found(request):
    words = [sys.executable, "-m", "tests.gpu.compiled", "--card", request.param]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_stage_and_the_whole_forward_compile(found) -> None:
    made = Counter(program.get("dtype", "whole") for program in found["programs"])
    assert set(made) == {*DTYPES, "whole"} and made["whole"] == len(WHOLE)
    assert len({made[dtype] for dtype in DTYPES}) == 1


def test_products_are_cublas_s_at_full_precision(found) -> None:
    """One call for each, so that no weights are put together before; never TF32, which "DEFAULT" would be."""
    for program in found["programs"]:
        calls = {name: count for name, count in program["calls"].items() if name in CUBLAS}
        assert set(program["calls"]) <= CUBLAS | OTHERS, program
        assert program["precisions"] == ({'"HIGHEST","HIGHEST"': sum(calls.values())} if calls else {}), program
        if program["stage"] != "forward":
            assert sum(calls.values()) == DOTS.get(program["stage"], 0), program


def test_nothing_in_the_machine_code_rounds_to_tf32_or_adds_in_any_order(found) -> None:
    kinds = {word.split(".")[0] for word in found["instructions"]}
    assert "ex2" in kinds  # so that something was read at all
    assert not kinds & {"mma", "wgmma", "atom", "red"}


def test_no_stage_takes_more_memory_than_its_plan(found) -> None:
    for program in found["programs"]:
        assert program["temporary"] <= program.get("planned", float("inf")), program


def test_what_four_cards_tell_each_other(found) -> None:
    """Sums that each has a part of; q, k and v, split one by one, side by side; and biases for what each has whole."""
    talk = {program["stage"]: [*program["between_cards"]] for program in found["split"] if program["between_cards"]}
    sums = {"attn_out": ["all-reduce"], "ffn_out": ["all-reduce"]}
    assert talk == {"qkv_matmul": ["all-to-all"], "qkv_bias": ["all-gather"]} | sums
