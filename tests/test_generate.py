"""Greedy decoding, and ATTN-SUB-005: 16 tokens are the same whether somebody looks at the stages or not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxref
from jaxref.generate import generate
from jaxref.precision import numerics_of
from tests.commands import ROOT, refused
from tests.conftest import prompt
from weights import open_checkpoint

FLOAT32 = numerics_of("float32")


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "moe"])
def test_attn_sub_005_sixteen_greedy_tokens_are_the_same_with_and_without_capture(zoo, name: str) -> None:
    checkpoint, tokens, seen = open_checkpoint(zoo(name)), prompt(7, 272), []

    def watch(layer: int | None, piece) -> None:
        seen.append((layer, piece.stage, np.array(piece.value)))

    plain = list(generate(checkpoint, tokens, FLOAT32, 16))
    watched = list(generate(checkpoint, tokens, FLOAT32, 16, watch=watch))
    assert [step.token for step in plain] == [step.token for step in watched]
    assert b"".join(s.logits.tobytes() for s in plain) == b"".join(s.logits.tobytes() for s in watched)
    assert len(plain) == 16
    assert sum(stage == "attn_norm" for _, stage, _ in seen) == 16 * checkpoint.config.num_hidden_layers


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "qwen2-yarn", "qwen3", "moe"])
def test_each_step_is_the_last_row_of_a_prefill(zoo, name: str) -> None:
    checkpoint, tokens = open_checkpoint(zoo(name)), prompt(9, 272)
    for step in generate(checkpoint, list(tokens), FLOAT32, 5):
        whole = jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config)["lm_head"][-1]
        np.testing.assert_allclose(step.logits, whole, rtol=2e-4, atol=2e-5)
        assert step.token == int(np.argmax(whole))
        tokens.append(step.token)


def test_the_command_prints_ids_and_text(zoo) -> None:
    words = [sys.executable, "-m", "jaxref", "generate", "--prompt", "Hi", "--max-tokens", "4"]
    root = Path(__file__).parent.parent
    plain = subprocess.run(words, capture_output=True, text=True, cwd=root, check=True).stdout.splitlines()
    facts = json.loads(subprocess.run([*words, "--json"], capture_output=True, text=True, cwd=root, check=True).stdout)
    assert plain == [",".join(map(str, facts["tokens"])), repr(facts["text"])]
    assert len(facts["tokens"]) == 4


@pytest.mark.parametrize("stated", [{"generation_config.json": [9, "first"]}, {"config.json": "first"}])
def test_it_stops_where_the_text_ends(zoo, tmp_path: Path, stated: dict) -> None:
    shutil.copytree(zoo("qwen2"), tmp_path / "model")
    words = [sys.executable, "-m", "jaxref", "generate", str(tmp_path / "model"), "--prompt", "Hi", "--json"]
    words += ["--max-tokens", "4"]

    def tokens(*more: str) -> list[int]:
        done = subprocess.run([*words, *more], capture_output=True, text=True, check=True, cwd=ROOT)
        return json.loads(done.stdout)["tokens"]

    free = tokens("--ignore-eos")
    for name, ids in stated.items():
        path = tmp_path / "model" / name
        before = json.loads(path.read_text()) if path.exists() else {}
        ids = [free[0] if one == "first" else one for one in ids] if isinstance(ids, list) else free[0]
        path.write_text(json.dumps(before | {"eos_token_id": ids}))
    assert tokens() == free[:1]
    assert tokens("--ignore-eos") == free


def test_room_for_more_positions_than_the_machine_has_is_refused() -> None:
    assert "at most" in refused("generate", "tiny", "--max-tokens", "99999999999")


@pytest.mark.real_model
def test_the_real_model_answers(real_model: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "jaxref",
        "generate",
        str(real_model / "hf"),
        "--chat",
        "--max-tokens",
        "20",
        "--json",
    ]
    facts = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert facts["text"] == "2 + 2 equals 4.<|im_end|>"
