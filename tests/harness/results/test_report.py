from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tenslora.harness.results import write_results
from tenslora.harness.results.report import report
from tests.tables import made, table, whole

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
]


def test_everything_is_written_and_nothing_else(tmp_path: Path) -> None:
    paths = write_results(table([made("lora", epochs=[0.5]), made("att", "isorank", epochs=[0.6])]), tmp_path)
    drawn = [f"figures/{name}" for name in ("score_vs_parameters", "learning_curves")]
    figures = [f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    names = ["table.md", "table.tex", "table.csv", *figures, "report.html"]
    assert paths == [tmp_path / name for name in names]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(paths)
    assert all(path.stat().st_size for path in paths)


def test_a_setting_that_is_swept_has_a_table_of_its_own() -> None:
    runs = [made("att", "isorank", epochs=[0.5 + k / 10], variant=(f"adapter.alpha={k}",)) for k in range(3)]
    section = report(table(runs)).partition("by <code>adapter.alpha</code>")[2].partition("</table>")[0]
    assert re.findall(r'<span class="mean[^>]*>([\d.]+)<', section) == ["50.0", "60.0", "70.0"]
    assert re.findall(r'<button type="button">(\w+)<', section) == ["construction", "0", "1", "2"]


def test_before_the_first_score_there_is_a_report_without_figures(tmp_path: Path) -> None:
    paths = write_results(table([made("lora"), made("att", "isorank")]), tmp_path)
    assert [path.name for path in paths] == ["table.md", "table.tex", "table.csv", "report.html"]
    text = paths[-1].read_text()
    assert "0 of 2 runs finished, 2 missing." in text
    assert 'role="img"' not in text


def test_what_a_user_wrote_is_text_and_never_markup() -> None:
    run = made("lora", epochs=[0.5], variant=("note=<b>&",), problem='<script>alert("x")</script>')
    text = report(table([run, made("lora", seed=1, epochs=[0.5])], title="<i>", notes=("<u>",)))
    assert text.count("<script>") == 1
    assert not re.search("<[biu]>", text)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text


def test_how_it_was_made_has_every_value_once() -> None:
    def of(run: Any, torch: str) -> Any:
        versions = {"python": "3.11.7", "torch": torch}
        return replace(run, record={**run.record, "environment": {**run.record["environment"], "versions": versions}})

    runs = [of(made("lora", seed=seed, epochs=[0.5]), torch) for seed, torch in enumerate(("2.6.0", "2.7.1", "2.6.0"))]
    section = report(table(runs)).partition("How it was made")[2]
    assert "<dt>torch</dt><dd>2.6.0; 2.7.1</dd>" in section
    assert section.count("d206ab517a5399bed7b9395fba4d805547f99308") == 1
    assert section.count("NVIDIA H100 80GB HBM3") == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report(whole()))
    return path.as_uri()


def show(browser: webdriver.Chrome, page: str, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)


def header(browser: webdriver.Chrome, of: str, name: str) -> WebElement:
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{of} thead th")
    return next(head for head in heads if head.text.split("\n")[0] == name)


def column(browser: webdriver.Chrome, of: str, name: str) -> list[str]:
    """The cells below a header, from top to bottom."""
    texts: list[str] = browser.execute_script(
        "const [id, place] = arguments;"
        "return [...document.querySelectorAll(`#${id} tbody tr`)].map(row => row.cells[place].textContent.trim())",
        of,
        browser.execute_script("return arguments[0].cellIndex", header(browser, of, name)),
    )
    return texts


def test_a_click_on_a_header_sorts_by_number_and_another_reverses(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    before = column(browser, "runs-table", "parameters")
    head = header(browser, "runs-table", "parameters")

    head.find_element(By.TAG_NAME, "button").click()
    rising = column(browser, "runs-table", "parameters")
    assert head.get_attribute("aria-sort") == "ascending"
    counts = [int(text.replace(",", "")) for text in rising if text]
    # As text, 123,840 would come before 4,460.
    assert counts == sorted(counts) and len(set(counts)) > 10
    assert rising[len(counts) :] == [""] * (len(rising) - len(counts)), "what has no number stays below"
    assert sorted(rising) == sorted(before) and rising != before

    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"
    falling = column(browser, "runs-table", "parameters")
    assert [int(text.replace(",", "")) for text in falling if text] == sorted(counts, reverse=True)
    assert falling[-1] == ""

    header(browser, "runs-table", "seed").find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") is None
    assert len(browser.find_elements(By.CSS_SELECTOR, "#runs-table [aria-sort]")) == 1


def test_scores_and_differences_sort_by_value(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    for of, name in (("main-table", "dtd"), ("against-table", "difference")):
        header(browser, of, name).find_element(By.TAG_NAME, "button").click()
        texts = [text.split("±")[0].replace("\N{MINUS SIGN}", "-") for text in column(browser, of, name)]
        values = [float(text) for text in texts]
        assert values == sorted(values) and len(set(values)) > 10
    # Back to the paper's order.
    header(browser, "main-table", "construction").find_element(By.TAG_NAME, "button").click()
    assert column(browser, "main-table", "construction")[0] == "lora"
    assert column(browser, "main-table", "construction")[-1] == "head_only"


def test_on_a_phone_the_page_does_not_scroll_sideways(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page, width=360)
    page_width, window = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert (page_width, window) == (360, 360)
    tables, containers = browser.execute_script(
        "const within = element => element.getBoundingClientRect().right <= innerWidth;"
        "return ['table', '.scroll'].map(which => [...document.querySelectorAll(which)].every(within))"
    )
    assert not tables, "the tables are wider than a phone, or this test shows nothing"
    assert containers
    widths = browser.execute_script("return [...document.querySelectorAll('.figures svg')].map(svg => svg.clientWidth)")
    assert len(widths) == 8
    assert all(280 < width <= 328 for width in widths), "figures fill the width between the margins"


def luminance(colour: str) -> float:
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    show(browser, page, scheme=scheme)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.05) is (scheme == "dark")
    found = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some("
        "  n => n.nodeType === 3 && n.data.trim())).filter(e => e.tagName !== 'SCRIPT').map(e => {"
        "    const style = getComputedStyle(e);"
        "    return [e.textContent.trim().slice(0, 40), e.tagName === 'text' ? style.fill : style.color];"
        "})"
    )
    assert len(found) > 500
    assert {text for text, colour in found if contrast(colour, background) < 4.5} == set()
    assert "lora" in {text for text, _ in found}


def test_it_asks_nothing_of_the_network_and_logs_no_error(browser: webdriver.Chrome, page: str) -> None:
    logs: Any = browser  # its get_log has no types
    logs.get_log("performance"), logs.get_log("browser")
    show(browser, page)
    for button in browser.find_elements(By.CSS_SELECTOR, "#main-table button"):
        button.click()
    assert logs.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in logs.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page in asked
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
