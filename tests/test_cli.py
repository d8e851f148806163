"""The commands as people run them: what they print, and how they end when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxref import stage_file
from tests.trees import read_tree, tree_bytes, write_tree
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

ROOT = Path(__file__).parent.parent


def command(*words: object, module: str = "jaxref") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )


def refused(*words: object, module: str = "jaxref") -> str:
    """Run a command that must be refused: exit 2, one line on stderr, nothing on stdout."""
    done = command(*words, module=module)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dump", "/nowhere"], "no such model"),
        (["dump", "acme/unheard-of"], "neither a folder here nor an id in the local"),
        (["dump", "--tokens", "1,272"], "token ids [272] are outside the vocabulary"),
        (["dump", "--tokens", "-1"], "outside the vocabulary"),
        (["dump", "--tokens", ""], "at least one"),
        (["dump", "--tokens", "1,,2"], "whole numbers between commas"),
        (["dump", "--prompt", ""], "prompt is empty"),
        (["dump", "--prompt", "a\udcff"], "not valid UTF-8"),
        (["dump", "m" * 5000], "too long"),
        (["dump", "--prompt", "a", "--tokens", "1"], "exclude each other"),
        (["dump", "--tokens-file", "/nowhere"], "not readable as token ids"),
        (["dump", "--stages", "q_norm"], "qwen2 has no stage q_norm"),
        (["dump", "--stages", "nonsense"], "unknown stage 'nonsense'"),
        (["dump", "--stages", "a,,b"], "empty name"),
        (["dump", "--layers", "2..9"], "layers 0 to 3"),
        (["dump", "--positions", "12"], "positions 0 to 11"),
        (["dump", "--stages", "embedding", "--layers", "1"], "nothing to write"),
        (["dump", "--dtype", "int8"], "'int8' is not one of"),
        (["dump", "--device", "cuda"], "--device cuda"),
        (["dump", "--frobnicate"], "No such option"),
        (["nonsense"], "No such command"),
        (["stages", "/nowhere"], "no such model"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path, words: list[str], says: str) -> None:
    if words[0] == "dump":
        words = [*words, "--output", str(tmp_path / "tree")]
    assert says in refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_weights_commands_refuse_in_one_line(tmp_path: Path) -> None:
    assert "no such shape" in refused("tiny", tmp_path / "m", "--like", "900b", module="weights")
    assert "is a qwen2, not a qwen3" in refused(
        "tiny", tmp_path / "m", "--arch", "qwen3", "--like", "7b", module="weights"
    )
    assert "no such model" in refused("inspect", "/nowhere", module="weights")
    assert command("inspect", ROOT / "weights" / "embedded", module="weights").returncode == 0


def test_a_folder_with_another_dump_is_refused(tmp_path: Path) -> None:
    words = ["dump", "--output", tmp_path / "tree", "--stages", "attn_norm"]
    assert command(*words, "--tokens", "1,2").returncode == 0
    before = tree_bytes(tmp_path / "tree")
    assert "another dump (tokens differ)" in refused(*words, "--tokens", "1,3")
    assert "another dump (dtype differ)" in refused(*words, "--tokens", "1,2", "--dtype", "float64")
    assert tree_bytes(tmp_path / "tree") == before
    # The same run with other stages is welcome: the manifest then tells of both.
    assert command(*words, "--tokens", "1,2", "--stages", "attn_out").returncode == 0
    manifest = json.loads((tmp_path / "tree" / "manifest.json").read_text())
    assert [e["stage"] for e in manifest["files"]] == ["attn_norm", "attn_out"] * 4


def test_a_foreign_tree_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "layer-0").mkdir()
    (tmp_path / "layer-0" / "attn_norm.bin").write_bytes(b"an engine's")
    assert "another program's tree" in refused("dump", "--output", tmp_path)
    assert (tmp_path / "layer-0" / "attn_norm.bin").read_bytes() == b"an engine's"


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"schema": "other"}', '{"schema": "jaxref-tree-v1", "files": 3}'])
def test_a_broken_manifest_is_one_line(tmp_path: Path, broken: str) -> None:
    (tmp_path / "manifest.json").write_text(broken)
    assert "manifest.json" in refused("dump", "--output", tmp_path)


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refused("dump", "--output", tmp_path / "file" / "tree")


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


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch, zoo) -> None:
    import shutil

    from weights import UserError

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="the disk has 1,000 left"):
        write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    assert not (tmp_path / "tree").exists()


def test_a_disk_that_fills_up_leaves_no_half_file_and_the_same_dump_finishes(tmp_path, monkeypatch, zoo) -> None:
    write_tree(zoo("qwen2"), tmp_path / "whole", [1, 2, 3])
    put, calls = stage_file.StageFile._put, []

    def full(self, data) -> None:
        calls.append(1)
        if len(calls) > 61:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(stage_file.StageFile, "_put", full)
        with pytest.raises(OSError, match="No space left"):
            write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    names = [path.name for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert "manifest.json" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    assert ".unfinished.json" in names
    # Two threads write, so how many files are whole varies a little; that each one is does not.
    assert 28 <= len(read_tree(tmp_path / "tree")) <= 30
    write_tree(zoo("qwen2"), tmp_path / "tree", [1, 2, 3])
    assert tree_bytes(tmp_path / "tree") == tree_bytes(tmp_path / "whole")
    assert not (tmp_path / "tree" / ".unfinished.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_jax_is_imported_waits_for_its_end(tmp_path: Path, number: int) -> None:
    # Stands before JAX, whose modules in C end in a crash where Python code that they run is broken off.
    (tmp_path / "jax.py").write_text(
        f"import os, pathlib, sys\nos.kill(os.getpid(), {int(number)})\nfor _ in range(9**5): pass\n"
        f"pathlib.Path(__file__).with_suffix('.whole').touch()\nsys.path.remove({str(tmp_path)!r})\n"
        "del sys.modules['jax']\nimport jax\n"
    )
    words = [sys.executable, "-m", "jaxref", "dump", "tiny", "--output", str(tmp_path / "tree")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (tmp_path / "jax.whole").exists()
    assert (ended.returncode, ended.stderr.strip()) == (
        130,
        "error: interrupted; nothing half-written is left, the same command finishes it",
    )


@pytest.mark.parametrize("module", ["jaxref", "oracle", "weights"])
def test_no_arguments_bring_the_help_as_it_is(module: str) -> None:
    done = command(module=module)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ") and len(done.stderr.splitlines()) > 6


def test_nothing_is_no_name(tmp_path: Path) -> None:
    assert "--output" in refused("dump", "tiny", "--output", "")
    assert "MODEL is empty" in refused("dump", "", "--output", tmp_path / "tree")


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_dump_leaves_no_manifest_and_no_half_file(tmp_path: Path, number: int) -> None:
    write_random(tmp_path / "m", tiny_config("qwen2", "0.5b", 12, vocab_size=512))
    words = [sys.executable, "-m", "jaxref", "dump", str(tmp_path / "m"), "--output", str(tmp_path / "tree")]
    words += ["--tokens", ",".join(str(i) for i in range(400))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT, text=True)
    while not (tmp_path / "tree" / "layer-2").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in err
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert files and not [path for path in files if path.suffix == ".tmp" or path.name == "manifest.json"]
    assert all(len(path.read_bytes()) % 4 == 0 for path in files if path.suffix == ".bin")
    assert "another dump (tokens differ)" in refused(
        "dump", tmp_path / "m", "--tokens", "1", "--output", tmp_path / "tree"
    )
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "tree" / "manifest.json").exists()


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m jaxref dump --output {tmp_path}/t | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("embedded")


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
