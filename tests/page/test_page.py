"""What is written, without a browser: pages whole or not at all, any sheet, refusals, colours, and the sentence."""

from __future__ import annotations

import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from oracle import compare
from oracle.page import check_html, palette, render, write_html, write_sheet
from oracle.page.compare import experts_of, lines_of, sheet_of
from oracle.page.pairs import Pairs
from oracle.page.sheet import Cell, Listing, Series, Sheet
from oracle.result import Result
from oracle.rules import Options
from oracle.sentence import sentence
from oracle.tolerances import parse_tolerance
from tests.conftest import prompt
from tests.oracle.faults import FAULTS, map_trace, model, overwrite, run, with_layer, write, write_reference
from tests.page.pages import planted
from weights import UserError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return planted(tmp_path_factory.mktemp("result"))


class Ids(HTMLParser):
    """Every id, and every tag that is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_tags_close_and_ids_are_unique(result, tmp_path) -> None:
    write_html(result, tmp_path / "p.html")
    found = Ids((tmp_path / "p.html").read_text())
    assert not found.open
    assert len(found.ids) == len(set(found.ids)) > 20


def test_the_same_result_gives_the_same_bytes(result, tmp_path) -> None:
    for name in ("a.html", "b.html"):
        write_html(result, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_page_is_whole_or_not_there(result, tmp_path, monkeypatch) -> None:
    path = tmp_path / "p.html"
    path.write_text("<!DOCTYPE html>before")

    def fails(sheet: Sheet) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "page_of", fails)
    with pytest.raises(UserError, match=r"p\.html: cannot be written: No space left on device"):
        write_html(result, path)
    assert path.read_text() == "<!DOCTYPE html>before" and [p.name for p in tmp_path.iterdir()] == ["p.html"]


def test_refusals_come_before_the_work(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="is a folder; a file like"):
        check_html(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        check_html(tmp_path / "nowhere" / "p.html")
    check_html(Path("p.html"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'jaxref\[html\]'"):
        check_html(tmp_path / "p.html")


def test_any_sheet_can_be_a_page(tmp_path) -> None:
    """What localize hands in: a map of its own, findings, and nothing of a compare."""
    cells = [Cell((0, "attn_out"), 1e-7, "6", "agree"), Cell((0, "ffn_out"), 0.5, "X0", "diverge", {"cause": "a < b"})]
    line = Series("local error", {cell.key: cell.value or 0.0 for cell in cells}, marked=frozenset({(0, "ffn_out")}))
    listing = Listing("Tried", "Best first.", ["cause", "error"], [["gelu", "1e-7"]])
    sheet = Sheet("localize", "ffn_out", "diverge", "It is ffn_out.", cells, lines=[line], listings=[listing])
    write_sheet(sheet, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "a \\u003c b" in text and "<td>gelu</td>" in text and text.count("<svg") == 2
    write_sheet(Sheet("bare", "agrees", "agree", "Nothing.", cells), tmp_path / "bare.html")
    assert "<svg" not in (tmp_path / "bare.html").read_text()


@pytest.mark.parametrize(("value", "level"), [(0.0, 10), (1e-12, 9), (5e-4, 3), (0.05, 1), (0.5, 0), (7.0, 0)])
def test_shades_are_decimals(value, level) -> None:
    assert Cell((0, "attn_out"), value, "", "agree").level == level


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_far_off(value) -> None:
    assert Cell((0, "attn_out"), value, "", "agree").level == 0
    assert Cell((0, "attn_out"), None, "", "agree").level is None


def luminance(colour: str) -> float:
    """By the WCAG."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_words_can_be_read_and_shades_told_apart_without_colour(colours) -> None:
    for ink in ("ink", "muted", "test", "hf", "limit"):
        assert contrast(colours[ink], colours["paper"]) >= 4.5
    shades = [colours[f"v{level}"] for level in range(11)]
    assert all(contrast(shade, colours[f"t{level}"]) >= 4.5 for level, shade in enumerate(shades))
    bright = [luminance(shade) for shade in shades]
    assert bright in (sorted(bright), sorted(bright, reverse=True)) and len(set(bright)) == 11


def test_the_lines_hold_what_the_result_says(result) -> None:
    lines = {line.kind: line for line in lines_of(result)}
    assert min(lines["test"].marked, key=[c.key for c in result.comparisons].index) == (3, "qkv_bias")
    for found in result.comparisons:
        assert lines["test"].points[found.key] == found.test.relative_l2
        limit = lines["limit"].points.get(found.key)
        if found.good and limit is not None:
            assert found.test.relative_l2 <= limit
    assert set(lines["floor"].points.values()) == {2.0**-10}


def test_limits_by_rules(tmp_path) -> None:
    planted(tmp_path, yardstick=False)
    folders = tmp_path / "truth", tmp_path / "engine-trace"
    rules = tuple(parse_tolerance(text) for text in ("attn_out:0.5", "ffn_.*:cosine>=0.9"))
    kinds = {line.kind: line for line in lines_of(compare(*folders, options=Options(rules)))}
    limits = kinds["limit"].points
    assert limits[0, "attn_out"] == 0.5 and (0, "ffn_up") not in limits
    assert limits[1, "attn_norm"] == pytest.approx(0.03, rel=1e-3)
    assert "floor" not in kinds and "hf" not in kinds
    assert "limit" not in {line.kind for line in lines_of(compare(*folders, options=Options(min_cosine=0.9)))}


def test_sentences(tmp_path) -> None:
    """One for each kind of result; each is one sentence."""
    params, config = model("qwen2")
    ids = prompt(9, 272)
    trace = run(params, config, ids, "float32")
    truth = write_reference(tmp_path / "truth", trace, config, ids, "float32", producer="jaxref")

    def said(name: str, trace: dict, **options) -> str:
        text = sentence(compare(truth, write(tmp_path / name, trace), options=Options(**options)))
        assert text.endswith("Qwen2 with 4 layers, 9 tokens.") and "\n" not in text
        return text

    assert said("same", trace).startswith("the engine in same agrees with jaxref float32 at all 71 stages")
    fault = FAULTS["rope theta"]
    wrong = run(*fault.change(params, config), ids, "float32")
    text = said("theta", wrong)
    assert text.startswith("layer-0/q_post_rope of the engine in theta differs from jaxref float32 by relative L2 0.")
    assert "(bound 3.1e-05), worst at token " in text and " head " in text
    assert "every stage before it agrees, the last being layer-0/qkv_bias" in text
    text = said("theta", wrong, tolerances=(parse_tolerance("q_post_rope:cosine>=0.9999999"),))
    assert re.search(r"relative L2 0\.\d+ \(cosine 0\.\d+, not >= 1\)", text)
    scaled = run(*FAULTS["scaled embedding"].change(params, config), ids, "float32")
    assert "; it is the first compared; " in said("scaled", scaled)
    with FAULTS["NaN at one position"].plant():
        broken = run(params, config, ids, "float32")
    assert "layer-1/ffn_silu of the engine in nan has values that are not finite" in said("nan", broken)
    del trace["layer-2"]["attn_out"]
    assert "; 1 stage is missing; " in said("gap", trace)


def test_who_is_the_odd_one_out_is_said(result, tmp_path) -> None:
    """The same three trees in other roles: the one without k's bias as test, as yardstick, and as reference."""
    truth, test, hf = (result.trees[role].folder for role in ("reference", "test", "hf"))
    assert "; transformers float16 is 0.0015 off there; " in sentence(result)
    said = sentence(compare(truth, hf, test))
    assert "agrees with" in said and "; the yardstick is off from layer-3/qkv_bias on" in said
    wrong = shutil.copytree(test, tmp_path / "wrong")
    shutil.copy(truth / "manifest.json", wrong)
    said = sentence(compare(wrong, hf, hf))
    assert said.startswith("layer-3/qkv_bias of transformers float16 differs from jaxref float64 by relative L2 0.23")
    assert "(bound 0.03)" in said and "so the reference is the odd one out" in said


def test_experts_and_near_ties(tmp_path) -> None:
    params, config = model("qwen3_moe", num_experts=16)
    ids = prompt(40, 272)
    last = len(params.layers) - 1
    broken = with_layer(params, last, router=params.layers[last].router[::-1])
    exact = run(params, config, ids, "float64")
    write_reference(tmp_path / "truth", exact, config, ids, "float64", producer="jaxref", last=False)
    write(tmp_path / "engine", run(broken, config, ids, "bfloat16"), last=False)
    result = compare(tmp_path / "truth", tmp_path / "engine")
    (listing,) = experts_of(Pairs(result))
    rows = [row for row in listing.rows if row[0] == str(last)]
    chosen = exact[f"layer-{last}"]["moe_router_indices"]
    assert len(rows) > 30 and {row[-1] for row in rows} >= {"wrong"}
    for _, token, ours, theirs, _ in rows:
        assert [int(expert) for expert in ours.split(", ")] == chosen[int(token)].astype(int).tolist()
        assert sorted(ours.split(", ")) != sorted(theirs.split(", "))
    cells = {cell.key: cell for cell in sheet_of(result).cells}
    assert cells[last, "moe_router_logits"].status == "diverge"
    write_html(result, tmp_path / "p.html")
    assert "Experts that differ" in (tmp_path / "p.html").read_text()


def test_every_kind_of_cell(tmp_path) -> None:
    params, config = model("qwen2")
    ids = prompt(9, 272)
    trace = run(params, config, ids, "float32")
    truth = write_reference(tmp_path / "truth", trace, config, ids, "float32")

    def turned(stage: str, values):
        return values.reshape(9, -1, 16).swapaxes(0, 1) if stage == "q_post_rope" else values

    test = write(tmp_path / "test", map_trace(trace, lambda s, x: turned(s, x) if s == "q_post_rope" else x))
    (test / "layer-2" / "attn_out.bin").unlink()
    overwrite(test / "layer-3" / "ffn_up.bin", lambda values: values.__setitem__(7, math.nan))
    result = compare(truth, test)
    cells = {cell.key: cell for cell in sheet_of(result).cells}
    found = {key: (cells[key].status, cells[key].mark, cells[key].level) for key in cells}
    assert found[0, "q_post_rope"] == ("layout", "L=", 10)
    assert found[2, "attn_out"] == ("missing", "?", None)
    assert found[3, "ffn_up"] == ("diverge", "XN", 0)
    assert found[0, "attn_norm"] == ("agree", "=", 10)
    assert set(sheet_of(result).marks) == {"3", "=", "X", "N", "L", "?"}
    write_html(result, tmp_path / "p.html")  # the first divergence has no difference to draw
    assert "<h3>layer-0/q_post_rope: values</h3>" in (tmp_path / "p.html").read_text()
