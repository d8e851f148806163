"""The page in a real browser: no network, no error, the fault in its place, and readable on a phone and on paper."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from oracle import compare
from oracle.page import write_html
from tests.conftest import prompt
from tests.oracle.faults import model, overwrite, run, write_reference
from tests.page.browser import chromium, missing, requests, set_screen
from tests.page.pages import FAULTY, page

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CELL = ".map button[data-key='{}']"


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("page"))


@pytest.fixture
def shown(driver: webdriver.Chrome, report: Path) -> webdriver.Chrome:
    """The browser with the page freshly opened on a wide screen."""
    set_screen(driver, 1200)
    driver.get("about:blank")
    driver.get_log("browser")
    requests(driver)
    driver.get(report.as_uri())
    return driver


def cell(driver: webdriver.Chrome, key: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, CELL.format(key))


def details(driver: webdriver.Chrome) -> tuple[str, dict[str, str]]:
    """The heading and the lines of the panel."""
    panel = driver.find_element(By.ID, "details")
    names, words = (panel.find_elements(By.TAG_NAME, tag) for tag in ("dt", "dd"))
    lines = {name.text: word.text for name, word in zip(names, words, strict=True)}
    return panel.find_element(By.TAG_NAME, "h2").text, lines


def test_asks_nothing_of_a_network_and_logs_nothing(shown, report) -> None:
    cell(shown, "layer-0/attn_norm").click()
    assert {address for address in requests(shown) if not address.startswith("data:")} == {report.as_uri()}
    assert shown.get_log("browser") == []


def test_the_map_shows_the_fault_in_its_place(shown) -> None:
    crossed = [b.get_attribute("data-key") for b in shown.find_elements(By.CSS_SELECTOR, ".map .diverge")]
    assert crossed[0] == f"layer-{FAULTY[0]}/{FAULTY[1]}"
    assert cell(shown, crossed[0]).text == "X0"
    rows = shown.find_elements(By.CSS_SELECTOR, ".map tbody tr")
    assert [row.find_element(By.TAG_NAME, "th").text for row in rows] == ["0", "1", "2", "3", "4", "model"]
    heads = [h.get_attribute("textContent") for h in shown.find_elements(By.CSS_SELECTOR, ".map thead th")]
    place = heads.index(FAULTY[1])
    marks = [row.find_elements(By.CSS_SELECTOR, "th, td")[place].text for row in rows]
    assert marks[:3] == ["3", "2", "2"] and marks[3] == "X0"


def test_the_fault_is_shown_at_first_and_a_click_shows_another_stage(shown) -> None:
    heading, lines = details(shown)
    assert heading == "layer-3/qkv_bias" and "yardstick" in lines["fault"] and "token" in lines["greatest at"]
    cell(shown, "lm_head").click()
    heading, lines = details(shown)
    assert heading == "lm_head" and "KL, top-1, top-10" in lines
    assert cell(shown, "lm_head").get_attribute("aria-pressed") == "true"
    assert len(shown.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")) == 1


def test_keys_walk_and_enter_shows(shown) -> None:
    assert len(shown.find_elements(By.CSS_SELECTOR, ".map [tabindex='0']")) == 1  # one stop for the whole map
    shown.execute_script("arguments[0].focus()", cell(shown, "layer-3/qkv_bias"))
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.ENTER):
        shown.switch_to.active_element.send_keys(key)
    assert details(shown)[0] == "layer-2/q_post_rope"
    assert "layer-2/q_post_rope" in shown.find_element(By.ID, "hover").text
    # Where a layer has no such stage the walk passes over the hole.
    shown.execute_script("arguments[0].focus()", cell(shown, "layer-4/post_ffn_residual"))
    shown.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert shown.switch_to.active_element.get_attribute("data-key") == "layer-4/post_ffn_residual"


def test_the_address_keeps_the_stage(shown, report) -> None:
    cell(shown, "layer-1/ffn_up").click()
    assert shown.current_url.endswith("#layer-1/ffn_up")
    shown.refresh()
    assert details(shown)[0] == "layer-1/ffn_up"
    for strange in ("#nonsense", "#%E0%A4%A"):
        shown.get("about:blank")
        shown.get(report.as_uri() + strange)
        assert details(shown)[0] == "layer-3/qkv_bias"
    assert shown.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 820, 1200])
def test_nothing_is_wider_than_the_screen(shown, width) -> None:
    set_screen(shown, width)
    shown.refresh()
    assert shown.execute_script("return document.documentElement.scrollWidth") == width
    # Only the map may be wider than its box, which scrolls; the fault is in view.
    box, fault = (shown.find_element(By.CSS_SELECTOR, s).rect for s in (".scroll", CELL.format("layer-3/qkv_bias")))
    assert box["x"] <= fault["x"] and fault["x"] + fault["width"] <= box["x"] + box["width"] <= width
    if width == 360:
        assert shown.execute_script("return getComputedStyle(document.body).fontSize") == "15px"
        letters = "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        assert min(filter(None, shown.execute_script(letters))) >= 8


def test_dark_and_light_have_their_colours(shown) -> None:
    look = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    for dark in (False, True):
        set_screen(shown, 1200, dark=dark)
        ink, paper = shown.execute_script(look)
        assert (brightness(ink) > brightness(paper)) == dark
        # Words in the pictures follow; black ones on dark paper would be lost.
        words = "return [...document.querySelectorAll('figure svg text')].map(t => getComputedStyle(t).fill)"
        assert set(shown.execute_script(words)) == {ink}


def brightness(colour: str) -> int:
    """Of `rgb(1, 2, 3)` the sum."""
    return sum(int(part) for part in re.findall(r"\d+", colour))


def test_on_paper_it_is_light_and_loses_nothing(shown) -> None:
    set_screen(shown, 1200, dark=True)
    pdf = base64.b64decode(shown.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    assert shown.execute_script(style, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert shown.execute_script(style, "#copy", "display") == "none"
    assert shown.execute_script(style, ".map .cell", "printColorAdjust") == "exact"
    # A4 inside its margins: the map is not cut off.
    assert shown.execute_script("return document.querySelector('.map').getBoundingClientRect().right") <= 718
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_what_a_tree_says_is_never_run(driver, tmp_path) -> None:
    params, config = model("qwen2", num_hidden_layers=1)
    ids = prompt(5, 272)
    trace = run(params, config, ids, "float32")
    evil = "<script>document.title='run'</script></script><img src=x onerror=\"document.title='run'\">"
    write_reference(tmp_path / "a", trace, config, ids, "float32", producer=evil, model=evil)
    write_reference(tmp_path / "<b>b", trace, config, ids, "float32", producer=evil, model={"x": evil})
    overwrite(tmp_path / "<b>b" / "final_norm.bin", lambda values: values.__imul__(1.5))
    write_html(compare(tmp_path / "a", tmp_path / "<b>b"), tmp_path / "p.html")
    requests(driver)
    driver.get((tmp_path / "p.html").as_uri())
    assert driver.title == "<b>b against a: diverges first at final_norm"
    assert evil in driver.find_element(By.ID, "sentence").text
    assert len(requests(driver)) <= 2 and driver.get_log("browser") == []


def test_28_layers_stay_small(driver, tmp_path) -> None:
    path = page(tmp_path, layers=28, tokens=64)
    assert path.stat().st_size <= 2_000_000
    driver.get(path.as_uri())
    assert len(driver.find_elements(By.CSS_SELECTOR, ".map button")) == 28 * 17 + 3
    assert driver.find_element(By.CSS_SELECTOR, ".map .diverge").get_attribute("data-key") == "layer-3/qkv_bias"
    stored = driver.find_element(By.ID, "figures").get_attribute("textContent")
    assert len(json.loads(stored or "")) == 28 * 17 + 3
