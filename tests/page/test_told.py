"""The page of localize and explain in a real browser: the faulty stage in its place, its figures and its cause."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.page.browser import chromium, missing, requests, set_screen
from tests.page.pages import explained

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
FAULTS = {"qwen2": ("kv_heads_modulo", "attn_scores"), "qwen3_moe": ("moe_weights_twice", "moe_ffn_out")}


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("arch", FAULTS)
def test_the_fault_stands_in_its_place_with_figures_and_cause(driver, tmp_path: Path, arch: str) -> None:
    fault, stage = FAULTS[arch]
    path = explained(tmp_path, arch, fault)
    set_screen(driver, 1200)
    driver.get("about:blank")
    driver.get_log("browser")
    requests(driver)
    driver.get(path.as_uri())
    crossed = driver.find_elements(By.CSS_SELECTOR, ".map .diverge")
    assert [cell.get_attribute("data-key") for cell in crossed] == [f"layer-2/{stage}"]
    assert crossed[0].text.startswith("X") and crossed[0].get_attribute("aria-pressed") == "true"
    heading, lines = panel(driver)
    assert heading == f"layer-2/{stage}" and float(lines["own error"]) > float(lines["limit"])
    assert {"qwen2": "kv head h % K", "qwen3_moe": "applied twice"}[arch] in lines["because"]
    driver.find_element(By.CSS_SELECTOR, "[data-key='layer-2/post_ffn_residual']").click()
    heading, lines = panel(driver)
    assert heading == "layer-2/post_ffn_residual" and "because" not in lines
    assert float(lines["own error"]) <= float(lines["limit"]) < float(lines["accumulated"])
    assert {address for address in requests(driver) if not address.startswith("data:")} == {path.as_uri()}
    assert driver.get_log("browser") == []


def panel(driver: webdriver.Chrome) -> tuple[str, dict[str, str]]:
    """The heading and the lines of the panel."""
    found = driver.find_element(By.ID, "details")
    names, words = (found.find_elements(By.TAG_NAME, tag) for tag in ("dt", "dd"))
    return found.find_element(By.TAG_NAME, "h2").text, {n.text: w.text for n, w in zip(names, words, strict=True)}
