"""The command line: exit codes, JSON, JUnit, refusals in one line, and the example of the README."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from oracle import assert_parity
from oracle.__main__ import main
from tests.conftest import prompt
from tests.oracle.faults import FAULTS, model, overwrite, run, write, write_reference
from tests.trees import write_tree
from weights import UserError

TOKENS = prompt(9, 272)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ref (float64), test and hf (float16), and bad (wrong theta, no manifest)."""
    root = tmp_path_factory.mktemp("cli")
    params, config = model("qwen2")
    for name, dtype in (("ref", "float64"), ("test", "float16"), ("hf", "float16")):
        write_reference(root / name, run(params, config, TOKENS, dtype), config, TOKENS, dtype)
    write(root / "bad", run(*FAULTS["rope theta"].change(params, config), TOKENS, "float16"))
    return root


def oracle(*arguments: object) -> tuple[int, str]:
    """Exit code and stdout, or the message of a refusal."""
    found = CliRunner().invoke(main, [str(a) for a in arguments], standalone_mode=False)
    if isinstance(found.exception, UserError):
        assert len(str(found.exception).splitlines()) == 1
        return 2, str(found.exception)
    if found.exception is not None:
        raise found.exception
    return found.return_value or 0, found.output


def test_exit_codes_of_a_real_process(trees) -> None:
    def process(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "oracle", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    agree = process("compare", trees / "ref", trees / "test")
    assert (agree.returncode, agree.stderr) == (0, "")
    assert all(len(line) <= 80 for line in agree.stdout.splitlines() if not line.startswith(("reference", "test")))
    assert process("compare", trees / "ref", trees / "bad").returncode == 1
    wrong = process("compare", trees / "ref", trees / "nowhere")
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: ")
    assert len(wrong.stderr.splitlines()) == 1


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, oracle; assert not {'jax', 'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; from oracle import assert_parity, compare; assert callable(compare) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_records(trees) -> None:
    code, output = oracle("compare", trees / "ref", trees / "bad", "--hf", trees / "hf", "--json")
    records = [json.loads(line) for line in output.splitlines()]
    assert code == 1
    assert [r["record"] for r in records] == ["config"] + ["comparison"] * 71 + ["summary"]
    summary = records[-1]
    assert (summary["verdict"], summary["compared"], summary["blame"]) == ("diverge", 71, "test")
    first = summary["first_divergence"]
    assert (first["layer"], first["stage"], first["last_good"]) == (0, "q_post_rope", "qkv_bias")
    assert {"token", "head", "dim"} == set(first["coordinate"])
    assert records[1]["stage"] == "embedding" and records[-2]["stage"] == "lm_head"
    assert records[-2]["layer"] is None and {"kl", "top1", "top10"} <= set(records[-2])


def test_the_report_names_what_a_person_asks_for(trees) -> None:
    code, output = oracle("compare", trees / "ref", trees / "bad", "--hf", trees / "hf")
    assert code == 1
    assert "First divergence: layer-0/q_post_rope (q after RoPE)" in output
    assert "last good  layer-0/qkv_bias" in output and "blame: test" in output
    rows = [line for line in output.splitlines() if line.strip().split(" ")[0] in ("0", "1", "2", "3", "model")]
    assert len(rows) == 5 and "X0" in rows[0]


def test_missing_stages_fail_unless_allowed(trees, tmp_path) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    for layer in range(4):
        (tmp_path / "test" / f"layer-{layer}" / "post_attn_residual.bin").unlink()
    code, output = oracle("compare", trees / "ref", tmp_path / "test")
    assert code == 2 and "missing: layer-0/post_attn_residual" in output and "incomplete" in output
    code, output = oracle("compare", trees / "ref", tmp_path / "test", "--allow-missing", "post_attn.*", "--json")
    records = [json.loads(line) for line in output.splitlines()]
    assert (code, records[-1]["verdict"], records[-1]["skipped"]) == (0, "agree", 4)
    assert oracle("compare", trees / "ref", tmp_path / "test", "--allow-missing", "layer-[012]/.*")[0] == 2
    # A yardstick that lacks a stage is as incomplete.
    assert oracle("compare", trees / "ref", trees / "test", "--hf", tmp_path / "test")[0] == 2
    allowed = ("--allow-missing", "post_attn_residual")
    assert oracle("compare", trees / "ref", trees / "test", "--hf", tmp_path / "test", *allowed)[0] == 0


def test_junit(trees, tmp_path) -> None:
    assert oracle("compare", trees / "ref", trees / "bad", "--junit", tmp_path / "report.xml")[0] == 1
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert suite.tag == "testsuite" and suite.get("tests") == "71"
    failed = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert str(len(failed)) == suite.get("failures")
    assert (failed[0].get("classname"), failed[0].get("name")) == ("layer-0", "q_post_rope")


def test_assert_parity(trees) -> None:
    assert assert_parity(trees / "ref", trees / "test", hf=trees / "hf").verdict == "agree"
    with pytest.raises(AssertionError, match="First divergence: layer-0/q_post_rope") as failure:
        assert_parity(trees / "ref", trees / "bad", hf=trees / "hf", allow_missing=["lm_head"])
    assert "layer em an qm" in str(failure.value)


def test_other_tokens_and_other_models_are_refused(trees, tmp_path) -> None:
    params, config = model("qwen2")
    other = [*TOKENS[:-1], 3]
    write_reference(tmp_path / "tokens", run(params, config, other, "float16"), config, other, "float16")
    code, message = oracle("compare", trees / "ref", tmp_path / "tokens")
    assert code == 2 and "other tokens" in message
    params, config = model("qwen3")
    write_reference(tmp_path / "model", run(params, config, TOKENS, "float16"), config, TOKENS, "float16")
    code, message = oracle("compare", trees / "ref", tmp_path / "model")
    assert code == 2 and "different models: model_type qwen2 and qwen3" in message
    write(tmp_path / "last", {"lm_head": np.zeros((1, 272))})
    (tmp_path / "last" / "lm_head.bin").rename(tmp_path / "last" / "other.bin")
    assert oracle("compare", trees / "ref", tmp_path / "last")[0] == 2
    code, message = oracle("compare", trees / "bad", trees / "bad")
    assert code == 2 and "no manifest" in message
    params, config = model("qwen2")
    write_reference(tmp_path / "f32", run(params, config, TOKENS, "float32"), config, TOKENS, "float32")
    code, message = oracle("compare", trees / "ref", trees / "test", "--hf", tmp_path / "f32")
    assert code == 2 and "the yardstick is float32 and the test float16" in message


def test_weights_whose_digests_differ_are_another_model(trees, tmp_path) -> None:
    for name, digest in (("a", "00"), ("b", "11"), ("c", None)):
        shutil.copytree(trees / "ref", tmp_path / name)
        file = {"file": "model.safetensors", "size": 1, "header_sha256": "22"} | ({"sha256": digest} if digest else {})
        edit(tmp_path / name / "layer-1" / "x", weights=[file])
    assert oracle("compare", tmp_path / "a", tmp_path / "c")[0] == 0
    code, message = oracle("compare", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "different models: the bytes of model.safetensors differ" in message


def test_no_file_in_common(trees, tmp_path) -> None:
    write(tmp_path / "a", {"lm_head": np.zeros((1, 272))}, config=model("qwen2")[1].to_json(), tokens=TOKENS)
    write(tmp_path / "b", {"final_norm": np.zeros((9, 72))})
    code, message = oracle("compare", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "no stage in common" in message


BREAK = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "magic": lambda path: path.write_bytes(b"TRPA" + path.read_bytes()[4:]),
    "count": lambda path: path.write_bytes(struct.pack("<4sII", b"APRT", 1, 5) + bytes(20)),
    "none": lambda path: path.write_bytes(struct.pack("<4sII", b"APRT", 1, 0)),
    "layer": lambda path: path.write_bytes(struct.pack("<4sII", b"APRT", 7, 648) + path.read_bytes()[12:]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "manifest": lambda path: (path.parents[1] / "manifest.json").write_text("{"),
    "schema": lambda path: (path.parents[1] / "manifest.json").write_text('{"schema": "other"}'),
    "config": lambda path: edit(path, config={"model_type": 3}),
    "sizes": lambda path: edit(path, config="x"),
    "tokens": lambda path: edit(path, tokens="abc"),
    "dtype": lambda path: edit(path, dtype="float8"),
    "twice": lambda path: shutil.copy(path, path.with_suffix(".safetensors")),
    "safetensors": lambda path: path.rename(path.with_suffix(".safetensors")),
    "unfinished": lambda path: (path.parents[1] / "manifest.json").rename(path.parents[1] / ".unfinished.json"),
}


def edit(path: Path, **changes) -> None:
    manifest = path.parents[1] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


@pytest.mark.parametrize("which", ["ref", "test", "hf"])
@pytest.mark.parametrize("name", BREAK)
def test_broken_input_ends_in_one_line(trees, tmp_path, name: str, which: str) -> None:
    for role in ("ref", "test", "hf"):
        shutil.copytree(trees / role, tmp_path / role)
    BREAK[name](tmp_path / which / "layer-1" / "attn_norm.bin")
    code, message = oracle("compare", tmp_path / "ref", tmp_path / "test", "--hf", tmp_path / "hf")
    assert code == 2 and str(tmp_path / which) in message


def test_an_empty_folder_a_file_and_nothing(trees, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for tree in (tmp_path / "empty", tmp_path / "nowhere", trees / "ref" / "manifest.json"):
        assert oracle("compare", trees / "ref", tree)[0] == 2
        assert oracle("compare", tree, trees / "test")[0] == 2


@pytest.mark.parametrize(
    "options", [["--tolerance", "x"], ["--allow-missing", "("], ["--positions", "a"], ["--positions", "1,1"],
                ["--positions", "99"]]
)  # fmt: skip
def test_wrong_options_are_refused(trees, options: list[str]) -> None:
    assert oracle("compare", trees / "ref", trees / "bad", *options)[0] == 2


def test_safetensors_trees_keep_float64_and_bfloat16(zoo, tmp_path) -> None:
    for name in ("qwen2", "moe"):
        write_tree(zoo(name), tmp_path / name / "ref", TOKENS, dtype="float64", form="safetensors")
        write_tree(zoo(name), tmp_path / name / "test", TOKENS, dtype="bfloat16", form="safetensors")
        assert oracle("compare", tmp_path / name / "ref", tmp_path / name / "test")[0] == 0
    code, output = oracle("compare", tmp_path / "moe" / "ref", tmp_path / "moe" / "ref", "--json")
    assert code == 0
    assert {json.loads(line).get("relative_l2", 0.0) for line in output.splitlines()} == {0.0}


def test_a_config_that_differs_is_told(trees, tmp_path) -> None:
    params, config = FAULTS["rope theta"].change(*model("qwen2"))
    write_reference(tmp_path / "test", run(params, config, TOKENS, "float16"), config, TOKENS, "float16")
    code, output = oracle("compare", trees / "ref", tmp_path / "test")
    assert code == 1 and "rope_theta 10000.0 and 1000000.0" in " ".join(output.split())


def test_an_unknown_stage_and_an_alias(trees, tmp_path) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    (tmp_path / "test" / "layer-0" / "post_ffn_residual.bin").rename(tmp_path / "test/layer-0/layer_output.bin")
    shutil.copy(tmp_path / "test/layer-0/attn_norm.bin", tmp_path / "test/layer-0/mystery.bin")
    code, output = oracle("compare", trees / "ref", tmp_path / "test")
    assert code == 0 and "mystery.bin" in output


def test_nan_is_named_in_the_report(trees, tmp_path) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    overwrite(tmp_path / "test" / "layer-2" / "ffn_norm.bin", lambda x: x.__setitem__(72 * 3 + 5, np.nan))
    code, output = oracle("compare", trees / "ref", tmp_path / "test")
    assert code == 1 and "First divergence: layer-2/ffn_norm" in output and "token 3, dim 5" in output
