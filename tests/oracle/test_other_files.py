"""Files and names of others: what a report may replace, names that are no text, folders that cannot be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxref.aprt import read_aprt
from oracle import compare
from oracle.page import check_html
from oracle.records import check_junit, write_junit
from oracle.report import as_text
from oracle.result import Result
from oracle.rules import Options
from oracle.tolerances import compile_missing
from tests.conftest import prompt
from tests.fixtures.make import put
from tests.oracle.faults import model, overwrite, run, write, write_reference
from tests.oracle.test_cli import oracle
from weights import UserError

TOKENS = prompt(9, 272)
CHECKS = {"--html": check_html, "--junit": check_junit}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ref (float64), test (float32, bare), half (float16); of experts: moe (float64), moe-test and moe-hf (float32)."""
    root = tmp_path_factory.mktemp("trees")
    dense, moe = (model(arch, num_hidden_layers=2) for arch in ("qwen2", "qwen3_moe"))
    for name, (params, config), dtype in (
        ("ref", dense, "float64"),
        ("half", dense, "float16"),
        ("moe", moe, "float64"),
        ("moe-test", moe, "float32"),
        ("moe-hf", moe, "float32"),
    ):
        write_reference(root / name, run(params, config, TOKENS, dtype), config, TOKENS, dtype, last=False)
    write(root / "test", run(*dense, TOKENS, "float32"), last=False)
    return root


def resize(tree: Path, layer: int, stage: str, shape: tuple[int, ...] | None = None) -> None:
    """A stage of another shape (None: a token more), of its own values over and over."""
    values = read_aprt(tree / f"layer-{layer}" / f"{stage}.bin")[1]
    put(tree, layer, stage, np.resize(values, shape or (values.size // 9 * 10,)))


def refusing(closed: Path, original: Callable[..., object], path: object = ".") -> object:
    if str(path) == str(closed):
        raise PermissionError(13, "Permission denied", str(path))
    return original(path)


def folded(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("option", CHECKS)
@pytest.mark.parametrize("name", ["test/final_norm.bin", "ref/manifest.json", "engine.rs", "pom.xml", "notes.txt"])
def test_a_file_of_others_is_not_replaced(trees, tmp_path, option: str, name: str) -> None:
    for tree in ("ref", "test"):
        shutil.copytree(trees / tree, tmp_path / tree)
    (tmp_path / "engine.rs").write_text("fn main() {}\n")
    (tmp_path / "pom.xml").write_text("<?xml version='1.0'?>\n<project/>\n")
    (tmp_path / "notes.txt").write_text("see <html> and <testsuite>\n")
    before = (tmp_path / name).read_bytes()
    code, message = oracle("compare", tmp_path / "ref", tmp_path / "test", option, tmp_path / name)
    assert code == 2 and message.startswith(f"{tmp_path / name}: is there already"), message
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("option", CHECKS)
def test_an_earlier_report_is_replaced(trees, tmp_path, option: str) -> None:
    path = tmp_path / "report"
    path.touch()  # as mktemp leaves it
    sizes = []
    for test in ("test", "half"):
        assert oracle("compare", trees / "ref", trees / test, option, path)[0] == 0
        sizes.append(path.read_bytes())
        assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("check", CHECKS.values())
def test_where_no_report_can_be(tmp_path, check) -> None:
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "nowhere" / "r", "nowhere: no such folder"),
        (Path(os.devnull), "is there already"),
    ):
        with pytest.raises(UserError, match=words):
            check(path)
    check(tmp_path / "r")


def test_a_page_is_refused_before_the_work(tmp_path) -> None:
    (tmp_path / "engine.rs").write_text("fn main() {}")
    code, message = oracle("compare", tmp_path / "none", tmp_path / "none", "--html", tmp_path / "engine.rs")
    assert code == 2 and message.startswith(f"{tmp_path / 'engine.rs'}: is there already")


def test_a_report_is_whole_or_not_there(trees, tmp_path, monkeypatch) -> None:
    def full(path: Path, text: str, **more: object) -> int:
        raise OSError(28, "No space left on device")

    result = compare(trees / "ref", trees / "test")
    write_junit(result, tmp_path / "r.xml")
    before = (tmp_path / "r.xml").read_bytes()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"r\.xml: cannot be written: No space left on device"):
        write_junit(result, tmp_path / "r.xml")
    assert (tmp_path / "r.xml").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.xml"]


def test_names_that_are_no_text(trees, tmp_path) -> None:
    """A folder's name may be any bytes: a page stays UTF-8, a report XML, and a terminal is told nothing."""
    odd = tmp_path / os.fsdecode(b"eng\xff\x1b[31m\ni\x01ne")
    shutil.copytree(trees / "test", odd)
    page, report = tmp_path / "p.html", tmp_path / "r.xml"
    code, output = oracle("compare", trees / "ref", odd, "--html", page, "--junit", report)
    assert code == 0 and output.isascii() and r"eng\udcff\x1b[31m\ni\x01ne" in output
    assert all(c.isprintable() or c == "\n" for c in output)
    assert all(c.isprintable() or c in "\n" for c in page.read_text("utf-8"))
    assert r"eng\udcff\x1b[31m" in page.read_text("utf-8")
    text = ElementTree.parse(report).findtext("system-out")
    assert text is not None and r"eng\udcff\x1b[31m" in text
    code, output = oracle("diff", odd / "final_norm.bin", odd / "final_norm.bin")
    assert code == 0 and "\x1b" not in output and r"eng\udcff\x1b[31m" in output


@pytest.mark.parametrize("place", ["layer-1", ""])
def test_a_folder_that_cannot_be_read_is_not_empty(trees, tmp_path, monkeypatch, place: str) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    closed = tmp_path / "test" / place
    for name in ("listdir", "scandir"):  # root may read everything, so it is the system that refuses here
        monkeypatch.setattr(os, name, partial(refusing, closed, getattr(os, name)))
    with pytest.raises(UserError, match="cannot be read: Permission denied") as refusal:
        compare(trees / "ref", tmp_path / "test")
    assert str(refusal.value).startswith(f"{closed}: ")


def test_a_file_or_a_link_called_like_a_layer_is_none(trees, tmp_path) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    (tmp_path / "test" / "layer-5").touch()
    (tmp_path / "test" / "layer-6").symlink_to("nowhere")
    (tmp_path / "test" / "layer-1").rename(tmp_path / "elsewhere")
    (tmp_path / "test" / "layer-1").symlink_to(tmp_path / "elsewhere")
    assert compare(trees / "ref", tmp_path / "test").verdict == "agree"


@pytest.mark.parametrize(
    ("stage", "shape", "words"),
    [
        ("attn_norm", (10, 72), "[S, D] = [9, 72]: 10 rows of 72 values, the reference has 9 tokens"),
        ("attn_norm", (3, 72), "3 rows of 72 values, the reference has 9 tokens (--positions)"),
        ("attn_norm", (9, 70), "for 9 tokens 70 values each, the reference has 72"),
        ("attn_scores", (6, 10, 10), "10 x 10 values a head, the reference has 9 tokens"),
        ("attn_norm", (5,), "5 values fit no rows of [S, D] = [9, 72]"),
    ],
)  # fmt: skip
def test_one_file_of_another_shape_is_told_and_the_rest_compared(trees, tmp_path, stage, shape, words) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    resize(tmp_path / "test", 1, stage, shape)
    result = compare(trees / "ref", tmp_path / "test")
    whole = compare(trees / "ref", trees / "test")
    assert (result.verdict, result.exit_code) == ("incomplete", 2)
    assert [skip.key for skip in result.missing] == [(1, stage)]
    assert len(result.comparisons) == len(whole.comparisons) - 1
    assert words in result.missing[0].reason and words in folded(as_text(result))


def test_files_of_another_shape_in_the_yardstick_and_the_reference(trees, tmp_path) -> None:
    """The page opens the files again, and must not stumble over them either."""
    for name in ("moe", "moe-test", "moe-hf"):
        shutil.copytree(trees / name, tmp_path / name)
    resize(tmp_path / "moe-hf", 0, "moe_router_logits")
    resize(tmp_path / "moe-test", 0, "moe_router")
    resize(tmp_path / "moe", 1, "ffn_norm")
    arguments = [tmp_path / "moe", tmp_path / "moe-test", "--hf", tmp_path / "moe-hf", "--html", tmp_path / "p.html"]
    code, output = oracle("compare", *arguments)
    assert code == 2 and ", 3 missing" in output
    for words in (
        "layer-0/moe_router_logits: in the yardstick tree",
        "layer-0/moe_router: in the test tree",
        "layer-1/ffn_norm: in the reference tree",
    ):
        assert f"missing: {words}" in folded(output)
    assert "in the yardstick tree" in (tmp_path / "p.html").read_text()


def test_nothing_but_other_shapes_is_refused(trees, tmp_path) -> None:
    put(tmp_path / "test", 1, "attn_norm", np.zeros(700))
    put(tmp_path / "test", 1, "attn_out", np.zeros(700))
    with pytest.raises(UserError, match=r"layer-1/attn_norm\.bin: 700 values fit no rows"):
        compare(trees / "ref", tmp_path / "test")


def worst(result: Result) -> str:
    return next(line for line in as_text(result).splitlines() if "worst at" in line or "every value" in line)


def test_a_small_figure_is_no_0_percent(trees, tmp_path) -> None:
    line = worst(compare(trees / "ref", trees / "test"))
    assert line.startswith("float32 is worst at layer ") and "%" not in line and "e-0" in line
    assert "%" in worst(compare(trees / "ref", trees / "half"))
    assert worst(compare(trees / "ref", trees / "ref")) == "every value compared equals the reference's"


def test_the_legend_says_what_an_n_is(trees, tmp_path) -> None:
    shutil.copytree(trees / "test", tmp_path / "test")
    assert "N: " not in as_text(compare(trees / "ref", tmp_path / "test"))
    overwrite(tmp_path / "test" / "layer-1" / "attn_out.bin", lambda values: values.__setitem__(5, np.nan))
    text = as_text(compare(trees / "ref", tmp_path / "test"))
    assert "XN" in text and "X: diverges, N: NaN or infinite in one only" in folded(text)


def notes(result: Result) -> list[str]:
    return [note for note in result.notes if "the yardstick is" in note or "allow-missing" in note]


def test_a_coarse_yardstick_is_noted(trees, tmp_path) -> None:
    by_values = "the yardstick is float16, the tree under test by its values float32 (--test-dtype)"
    assert notes(compare(trees / "ref", trees / "test", trees / "half")) == [
        f"{by_values}: its noise hides smaller faults"
    ]
    shutil.copytree(trees / "half", tmp_path / "bare")
    (tmp_path / "bare" / "manifest.json").unlink()
    stated = compare(trees / "moe", trees / "moe-test", trees / "moe-hf")
    assert notes(stated) == []
    found = compare(trees / "ref", trees / "test", tmp_path / "bare", Options(test_dtype="float32"))
    assert notes(found) == ["the yardstick is float16, the tree under test float32: its noise hides smaller faults"]
    # A float16 engine without a manifest, and whoever says that it is one.
    assert notes(compare(trees / "ref", tmp_path / "bare", trees / "half")) == []
    assert notes(compare(trees / "ref", trees / "test", trees / "half", Options(test_dtype="float16"))) == []


def test_a_pattern_that_no_stage_meets_is_noted(trees) -> None:
    def told(*patterns: str) -> list[str]:
        return notes(compare(trees / "ref", trees / "test", options=Options(allow_missing=compile_missing(patterns))))

    assert told("atn_norm", "lm_.*", "layer-[0-9]+/ffn_out") == [
        "allow-missing 'atn_norm': no stage of the reference is called so"
    ]
    assert told("attn_norm") == [] and told("layer-7/.*") != []
