"""`oracle localize` and `oracle explain` as people run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from oracle.localize import localize
from tests.conftest import prompt
from tests.oracle.standin import Planted, run, write
from tests.oracle.sweep import Models
from tests.trees import write_tree
from weights import EMBEDDED, UserError, open_checkpoint

TOKENS = prompt(23, 272)
CLEAN = Planted("", ())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "oracle", *map(str, words)], capture_output=True, text=True)


def test_the_command_line(models: Models, tmp_path: Path) -> None:
    raw, weights, checkpoint = models.get("qwen2", CLEAN)
    tree, tokens = tmp_path / "engine", ",".join(map(str, TOKENS))
    write(tree, run(raw, weights, TOKENS, "float16", {"rope_theta/500000": None}))
    done = cli("explain", checkpoint.folder, tree, "--tokens", tokens, "--json")
    assert done.returncode == 1 and not done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [records[0]["record"], records[-1]["record"]] == ["config", "summary"]
    summary = records[-1]
    assert summary["verdict"] == "faulty"
    assert {fault["stage"] for fault in summary["faults"]} == {"q_post_rope", "k_post_rope"}
    for fault in summary["faults"]:
        assert fault["layers"] == [0, 1, 2, 3]
        assert fault["explanation"]["hypothesis"] == "rope_theta"
        assert fault["explanation"]["parameter"] == 500000
        assert fault["local_rel_l2"] > 4 * fault["floor"]
    text = cli("localize", checkpoint.folder, tree)
    assert text.returncode == 1
    assert "q_post_rope, all 4 layers" in text.stdout and "not replayed: layer-0/embedding" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["engine", "--tokens", "1,2"], "fit no rows"),
        (["engine", "--positions", "1,1"], "one of them is there twice"),
        (["empty"], "holds no stage's file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "empty").mkdir()
    write_tree(EMBEDDED, tmp_path / "engine", TOKENS)
    (tmp_path / "engine" / "manifest.json").unlink()
    done = cli("localize", EMBEDDED, tmp_path / words[0], *words[1:])
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_another_models_tree_is_refused(models: Models, tmp_path: Path) -> None:
    raw, weights, _ = models.get("qwen2", CLEAN)
    write(tmp_path, run(raw, weights, TOKENS, "float32"))
    wide = open_checkpoint(_wide(tmp_path / "wide"))
    with pytest.raises(UserError, match=r"fit no rows|no stage there tells"):
        localize(wide, tmp_path, TOKENS)


def _wide(folder: Path) -> Path:
    from weights.tiny import tiny_config, write_random

    write_random(folder, tiny_config("qwen2", hidden_size=80))
    return folder


def test_the_page_shows_the_fault_and_its_cause(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the html extra: pip install 'jaxref[html]'")
    raw, weights, checkpoint = models.get("qwen2", CLEAN)
    write(tmp_path / "engine", run(raw, weights, TOKENS, "float32", {"bias_missing": {1}}))
    page = tmp_path / "report.html"
    done = cli("explain", checkpoint.folder, tmp_path / "engine", "--html", page)
    assert done.returncode == 1, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "faulty: qkv_bias" in text and "the bias of q, k, v is missing" in text
    assert "https://" not in text.replace("https://www.w3.org", "")
    assert cli("explain", checkpoint.folder, tmp_path / "engine", "--html", tmp_path).returncode == 2
