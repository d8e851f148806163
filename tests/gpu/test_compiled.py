"""What XLA's CUDA compiler makes for a card that need not be there; without the compiler these tests are skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.commands import ROOT
from tests.gpu.cards import CARDS
from tests.gpu.compiled import DTYPES, SHORT, WHOLE
from tests.gpu.conftest import HAS_PLUGIN
from tests.test_devices import clean_environment
from tests.test_lowered import DOTS

pytestmark = pytest.mark.skipif(not HAS_PLUGIN, reason="XLA's CUDA compiler is in jaxref[cuda12], which is 5 GB")
OURS = "__gpu$xla.gpu.triton"  # what Pallas makes of jaxref/few_rows.py
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
    for programs in (found["programs"], found["short"]):
        made = Counter(program["dtype"] for program in programs)
        assert set(made) == {*DTYPES} and len(set(made.values())) == 1
    made = Counter(program["stage"] for program in found["whole"])
    assert made == {"forward": len(WHOLE), "program": 2 * len(DTYPES)}


def test_products_are_cublas_s_at_full_precision(found) -> None:
    """One call for each, so that no weights are put together before; never TF32, which "DEFAULT" would be."""
    for program in found["programs"] + [program for program in found["whole"] if program["stage"] == "forward"]:
        calls = {name: count for name, count in program["calls"].items() if name in CUBLAS}
        assert set(program["calls"]) <= CUBLAS | OTHERS, program
        assert program["precisions"] == ({'"HIGHEST","HIGHEST"': sum(calls.values())} if calls else {}), program
        if program["stage"] != "forward":
            assert sum(calls.values()) == DOTS.get(program["stage"], 0), program


def test_products_of_few_rows_are_kernels_of_ours(found) -> None:
    """Those of parameters; so that none is widened in memory before."""
    for program in found["short"]:
        attention = DOTS[program["stage"]] if program["stage"] in ("attn_scores", "attention") else 0
        made = {"cublas": sum(program["calls"].get(name, 0) for name in CUBLAS), "ours": program["calls"].get(OURS, 0)}
        assert made == {"cublas": attention, "ours": DOTS.get(program["stage"], 0) - attention}, program
    for program in found["whole"]:
        if program["stage"] == "program":
            assert (OURS in program["calls"]) == (program["count"] == SHORT), program
            assert set(program["precisions"]) == {'"HIGHEST","HIGHEST"'}, program


def test_nothing_in_the_machine_code_rounds_to_tf32_or_adds_in_any_order(found) -> None:
    kinds = {word.split(".")[0] for word in found["instructions"]}
    assert "ex2" in kinds  # so that something was read at all
    assert not kinds & {"mma", "wgmma", "atom", "red"}


def test_no_stage_takes_more_memory_than_its_plan(found) -> None:
    for program in found["programs"] + found["short"] + found["whole"]:
        assert program["temporary"] <= program.get("planned", float("inf")), program


def test_what_four_cards_tell_each_other(found) -> None:
    """Sums that each has a part of; q, k and v, split one by one, side by side; and biases for what each has whole."""
    talk = {program["stage"]: [*program["between_cards"]] for program in found["split"] if program["between_cards"]}
    sums = {"attn_out": ["all-reduce"], "ffn_out": ["all-reduce"]}
    assert talk == {"qkv_matmul": ["all-to-all"], "qkv_bias": ["all-gather"]} | sums
