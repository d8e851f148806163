"""The commands as people run them: what they print."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.commands import ROOT, command, refused
from tests.trees import tree_bytes, write_tree
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random


def test_the_embedded_model_dumps_without_any_argument(tmp_path: Path) -> None:
    done = command("dump", "--output", tmp_path / "tree")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "post_attn_residual" in done.stdout
    assert "71 files" in done.stdout
    assert done.stdout.count("next ") == 5
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    assert manifest["prompt"] == "What is 2+2?"
    assert len(manifest["tokens"]) == 12


def test_a_broken_tokenizer_stands_in_the_way_of_texts_alone(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random(model, tiny_config("qwen2"))
    (model / "tokenizer.json").write_text("{}")
    ids = ("dump", model, "--tokens", "1,2,3", "--output", tmp_path / "tree")
    assert "the tokenizer is not readable" in refused(*ids)
    assert "the tokenizer is not readable" in refused(*ids, "--json")
    assert not (tmp_path / "tree").exists()
    assert command(*ids, "--quiet").returncode == 0
    assert (tmp_path / "tree" / "manifest.json").exists()


def test_json_is_one_object_and_quiet_is_quiet(tmp_path: Path) -> None:
    done = command("dump", "--tokens", "1,2,3", "--json", "--output", tmp_path / "tree")
    facts = json.loads(done.stdout)
    assert facts["tokens"] == [1, 2, 3]
    assert facts["files"] == 71
    assert len(facts["next_tokens"]) == 5
    done = command("dump", "--tokens", "1,2,3", "--quiet", "--output", tmp_path / "tree")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plan_writes_nothing_and_tells_the_truth(tmp_path: Path) -> None:
    words = ["dump", "--stages", "attn_scores,lm_head", "--layers", "1..3", "--output", tmp_path / "tree"]
    plan = json.loads(command(*words, "--plan", "--json").stdout)
    assert not (tmp_path / "tree").exists()
    assert command(*words).returncode == 0
    written = tree_bytes(tmp_path / "tree")
    assert set(plan["files"]) == set(written)
    assert plan["bytes"] == sum(len(data) - 12 for data in written.values())
    assert "not written" in command(*words, "--plan").stdout


def test_the_table_of_stages(tmp_path: Path) -> None:
    everything, qwen2 = command("stages").stdout, command("stages", ROOT / "weights" / "embedded").stdout
    assert "q_norm" in everything and "q_norm" not in qwen2
    assert "[6, S, S]" in qwen2


def test_chat_and_tokens_file(tmp_path: Path) -> None:
    done = command("dump", "--prompt", "Hi", "--chat", "--json", "--output", tmp_path / "a", "--stages", "lm_head")
    assert json.loads(done.stdout)["tokens"][0] == 257  # <|im_start|>
    (tmp_path / "ids").write_text("5, 6\n7 8\n")
    done = command("dump", "--tokens-file", tmp_path / "ids", "--json", "--output", tmp_path / "b", "--layers", "0")
    assert json.loads(done.stdout)["tokens"] == [5, 6, 7, 8]


def test_a_nan_in_the_weights_is_a_warning_that_names_the_tensor(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_random(tmp_path / "m", tiny_config("qwen2", None, 2), dtype="float32")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    done = command("dump", tmp_path / "m", "--output", tmp_path / "tree")
    assert done.returncode == 0
    assert done.stderr == "warning: model.layers.1.mlp.up_proj.weight: 1 of 8064 values are NaN or infinite\n"
    assert "layer-1/ffn_up.bin is the first with" in done.stdout


@pytest.mark.parametrize("module", ["jaxref", "oracle", "weights"])
def test_no_arguments_bring_the_help_as_it_is(module: str) -> None:
    done = command(module=module)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ") and len(done.stderr.splitlines()) > 6


def test_token_ids_come_by_commas_or_blanks(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("54, 71\n64\n")
    words = ("dump", "tiny", "--plan", "--json")
    for given in (("--tokens", "54 71 64"), ("--tokens", "54,71, 64"), ("--tokens-file", tmp_path / "ids")):
        assert json.loads(command(*words, *given).stdout)["stages"][0]["shape"] == [3, 72]
    (tmp_path / "empty").touch()
    assert "empty: holds no token ids" in refused(*words, "--tokens-file", tmp_path / "empty")
    missing = refused(*words, "--tokens-file", tmp_path / "missing")
    assert missing.count("missing") == 1 and "Errno" not in missing
    assert "between commas or blanks" in refused(*words, "--tokens", "54,,71")


def test_the_faults_that_can_be_planted_are_listed() -> None:
    done = command("plant", "--fault", "list", module="oracle")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"rope_theta", "kv_heads_modulo"} <= set(done.stdout.split())


@pytest.mark.parametrize("module", ["jaxref", "oracle", "weights"])
def test_help_needs_neither_jax_nor_numpy(module: str) -> None:
    code = f"import sys, runpy\nsys.argv = ['x', '--help']\ntry: runpy.run_module({module!r}, run_name='__main__')\n"
    code += "except SystemExit: print({'jax', 'numpy', 'gguf', 'rich'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "set()"


def test_a_terminal_gets_a_progress_bar_and_a_table_that_fits(tmp_path: Path) -> None:
    write_random(tmp_path / "m", tiny_config("qwen3", None, 12))
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "jaxref", "dump", str(tmp_path / "m"), "--output", str(tmp_path / "tree")]
    environment = os.environ | {"COLUMNS": "60", "TERM": "xterm"}
    process = subprocess.Popen(words, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    screen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        screen += part
    assert process.wait() == 0
    assert b"12/12" in screen
    assert b"lm_head" in screen


def test_hashing_whole_files_is_the_same_dump(tmp_path: Path, zoo) -> None:
    write_tree(zoo("qwen2"), tmp_path, [1, 2], stages="attn_norm")
    done = command(
        "dump", zoo("qwen2"), "--tokens", "1,2", "--stages", "attn_norm", "--hash-weights", "--output", tmp_path
    )
    assert done.returncode == 0, done.stderr
    import hashlib

    (file,) = json.loads((tmp_path / "manifest.json").read_text())["weights"]
    path = open_checkpoint(zoo("qwen2")).folder / file["file"]
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
