"""The HTML report: as text, and as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tenslora.harness.results.report import to_html, write_report
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run, Table
from tests.tables import STSB, make_run, make_table

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
]
FUNCTIONS = (Path(__file__).parent / "page.js").read_text()


def test_a_swept_setting_has_a_table_of_its_own() -> None:
    runs = [make_run("att", "isorank", epochs=[0.5 + k / 10], variant=(f"adapter.alpha={k}",)) for k in range(3)]
    html = to_html(summarize(make_table(runs)))
    section = html.partition("by <code>adapter.alpha</code>")[2].partition("</table>")[0]
    assert re.findall(r'<span class="mean[^>]*>([\d.]+)<', section) == ["50.0", "60.0", "70.0"]
    assert re.findall(r'<button type="button">(\w+)<', section) == ["construction", "0", "1", "2"]


def test_what_a_user_wrote_is_text_and_never_markup() -> None:
    failed = make_run("lora", epochs=[0.5], variant=("note=<b>&",), problem='<script>alert("x")</script>')
    table = make_table([failed, make_run("lora", seed=1, epochs=[0.5])], title="<i>", notes=("<u>",))
    html = to_html(summarize(table))
    assert html.count("<script>") == 1
    assert not re.search("<[biu]>", html)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html


def test_how_it_was_made_has_every_value_once() -> None:
    def with_torch(run: Run, version: str) -> Run:
        assert run.record
        environment = {**run.record["environment"], "versions": {"python": "3.11.7", "torch": version}}
        return replace(run, record={**run.record, "environment": environment})

    versions = ["2.6.0", "2.7.1", "2.6.0"]
    runs = [with_torch(make_run("lora", seed=seed, epochs=[0.5]), version) for seed, version in enumerate(versions)]
    section = to_html(summarize(make_table(runs))).partition("How it was made")[2]
    assert "<dt>torch</dt><dd>2.6.0; 2.7.1</dd>" in section
    assert section.count("d206ab517a5399bed7b9395fba4d805547f99308") == 1
    assert section.count("NVIDIA H100 80GB HBM3") == 1


def test_figures_stand_in_the_page_with_ids_of_their_own_and_a_label(sample_report: str) -> None:
    svgs = re.findall(r'<svg role="img".*?</svg>', sample_report, flags=re.DOTALL)
    assert len(svgs) == 10, "two figures of four panels, and one of two"
    ids: list[str] = []
    for svg in svgs:
        root = ET.fromstring(svg)
        own = [id_ for element in root.iter() if (id_ := element.get("id"))]
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
        assert used
        assert set(used) <= set(own)
        ids += own
        assert root.get("viewBox")
        assert not root.get("width")
        assert not root.get("height")
    assert len(ids) == len(set(ids))
    assert 'aria-label="Score against parameters: dtd · vit_base · isoparameters"' in svgs[0]


def unfinished_table() -> Table:
    """Three runs of LoRA that are finished, running and missing, and a failed one of att."""
    return make_table(
        [
            make_run("lora", epochs=[0.5]),
            make_run("lora", seed=1, problem="running"),
            make_run("lora", seed=2, problem="missing"),
            make_run("att", "isorank", epochs=[0.4], problem="out of memory"),
        ],
        command="python sweep.py seed=0,1,2",
        settings=(("optimizer", "adamw, lr=0.001"),),
    )


def test_a_report_says_what_is_still_missing_and_what_the_runs_share() -> None:
    html = to_html(summarize(unfinished_table()))
    words = " ".join(re.sub("<[^>]*>", " ", html.partition("<main>")[2]).split())
    assert "python sweep.py seed=0,1,2 1 of 4 runs finished, 1 failed , 1 running, 1 missing." in words
    assert "att isorank, dtd with vit_base, seed 0 failed: out of memory" in words
    assert "1 running lora, dtd with vit_base, seed 1 1 missing lora, dtd with vit_base, seed 2" in words
    assert "optimizer adamw, lr=0.001" in words


def test_only_the_report_of_a_running_sweep_reloads_itself(tmp_path: Path) -> None:
    running = write_report(unfinished_table(), tmp_path, goes_on=True).read_text()
    assert "Written at" in running and "location.reload()" in running and '<meta http-equiv="refresh"' in running
    assert "1 waiting" in running and ">missing<" not in running
    ended = write_report(unfinished_table(), tmp_path, goes_on=False).read_text()
    assert "Written at" not in ended and "reload()" not in ended and "refresh" not in ended
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_other_scores_of_a_run_stand_beside_it() -> None:
    def with_others(run: Run) -> Run:
        assert run.record
        metrics = {**run.record["metrics"], "others_last": {"f1": 0.905, "matthews_mismatched": -0.25}}
        return replace(run, record={**run.record, "metrics": metrics})

    html = to_html(summarize(make_table([with_others(make_run("lora", epochs=[0.5])), make_run("att")])))
    assert "<td>f1 90.50, matthews_mismatched -25.00</td>" in html
    assert "other scores" not in to_html(summarize(make_table([make_run("lora", epochs=[0.5])])))


def test_scores_of_a_regression_are_shown_times_100() -> None:
    runs = [make_run("lora", epochs=[0.815], column=STSB), make_run("att", "isorank", epochs=[0.79], column=STSB)]
    html = to_html(summarize(make_table(runs)))
    assert "Test score after the last epoch times 100, one seed." in html
    assert "pearson after the last epoch (\N{MULTIPLICATION SIGN} 100)" in html
    assert "81.50</td>" in html and "\N{MINUS SIGN}2.50" in html
    assert "(%)" not in html and "per cent" not in html.partition("Against LoRA")[0]


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
def page(sample_report: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(sample_report)
    return path.as_uri()


def show(browser: webdriver.Chrome, page: str, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)


def ask(browser: webdriver.Chrome, call: str, *arguments: Any) -> Any:
    """What a call of one of the functions in page.js returns."""
    return browser.execute_script(f"{FUNCTIONS}\nreturn {call}", *arguments)


def header(browser: webdriver.Chrome, table: str, name: str) -> WebElement:
    heads = browser.find_elements(By.CSS_SELECTOR, f"#{table} thead th")
    return next(head for head in heads if head.text.split("\n")[0] == name)


def column(browser: webdriver.Chrome, table: str, name: str) -> list[list[str]]:
    """The cells below a header, from top to bottom, in a list for each dataset."""
    texts: list[list[str]] = ask(browser, "columnTexts(...arguments)", table, header(browser, table, name))
    return texts


def test_a_click_on_a_header_sorts_by_number_and_another_reverses(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    before = column(browser, "runs-table", "parameters")
    head = header(browser, "runs-table", "parameters")

    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    all_rising = column(browser, "runs-table", "parameters")
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"
    all_falling = column(browser, "runs-table", "parameters")
    assert len(before) == 2, "each dataset is sorted by itself"
    for unsorted, rising, falling in zip(before, all_rising, all_falling, strict=True):
        counts = [int(text.replace(",", "")) for text in rising if text]
        # As text, 123,840 would come before 4,460.
        assert counts == sorted(counts) and len(set(counts)) > 10
        assert rising[len(counts) :] == [""] * (len(rising) - len(counts)), "what has no number stays below"
        assert sorted(rising) == sorted(unsorted) and rising != unsorted
        assert [int(text.replace(",", "")) for text in falling if text] == sorted(counts, reverse=True)
        assert falling[-1] == ""

    header(browser, "runs-table", "seed").find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") is None
    assert len(browser.find_elements(By.CSS_SELECTOR, "#runs-table [aria-sort]")) == 1


def test_scores_and_differences_sort_by_value(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page)
    for table, name in (("main-table", "dtd"), ("against-table", "difference")):
        header(browser, table, name).find_element(By.TAG_NAME, "button").click()
        for texts in column(browser, table, name):
            values = [float(re.split(r"[ ±]", text)[0].replace("\N{MINUS SIGN}", "-")) for text in texts]
            assert values == sorted(values) and len(set(values)) > 10
    # Back to the paper's order.
    header(browser, "main-table", "construction").find_element(By.TAG_NAME, "button").click()
    [constructions] = column(browser, "main-table", "construction")
    assert (constructions[0], constructions[-1]) == ("lora", "head_only")


def test_on_a_phone_the_page_does_not_scroll_sideways(browser: webdriver.Chrome, page: str) -> None:
    show(browser, page, width=360)
    assert ask(browser, "[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    assert not ask(browser, "fits('table')"), "the tables are wider than a phone, or this test shows nothing"
    assert ask(browser, "fits('.scroll')")
    widths = ask(browser, "widths('.figures svg')")
    assert len(widths) == 10
    assert all(280 < width <= 328 for width in widths), "figures fill the width between the margins"


def test_a_running_sweeps_page_reloads_and_keeps_what_was_sorted_until_the_sweep_ends(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    page = write_report(unfinished_table(), tmp_path, goes_on=True)
    show(browser, page.as_uri(), width=360)

    def wait_for_a_reload() -> None:
        # The clock jumps, so that nobody has to wait for the time from one reload to the next.
        browser.execute_script("window.before = true; const now = Date.now; Date.now = () => now() + 1e6")
        WebDriverWait(browser, 30, 0.1, [JavascriptException]).until(
            lambda _: ask(browser, "!window.before && document.readyState === 'complete'")
        )

    header(browser, "runs-table", "last").find_element(By.TAG_NAME, "button").click()
    ask(browser, "document.querySelector('#runs-table').parentElement.scrollTo(40, 0)")
    ask(browser, "document.querySelector('details').open = false")
    ask(browser, "window.scrollTo(0, 300)")
    wait_for_a_reload()
    assert header(browser, "runs-table", "last").get_attribute("aria-sort") == "ascending"
    assert column(browser, "runs-table", "last") == [["50.00", "", "", ""]]
    assert ask(browser, "document.querySelector('#runs-table').parentElement.scrollLeft") == 40
    assert ask(browser, "[...document.querySelectorAll('details')].map(each => each.open)") == [False, True]
    assert ask(browser, "window.scrollY") == 300
    assert re.fullmatch(r", \d+ s ago|", ask(browser, "document.getElementById('age').textContent"))

    write_report(unfinished_table(), tmp_path, goes_on=False)
    wait_for_a_reload()
    assert ask(browser, "document.getElementById('age')") is None
    assert header(browser, "runs-table", "last").get_attribute("aria-sort") == "ascending"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [float(number) / 255 for number in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio as WCAG 2 defines it; 4.5 is its least for text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    show(browser, page, scheme=scheme)
    background = ask(browser, "getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.05) is (scheme == "dark")
    texts = ask(browser, "textColours()")
    assert len(texts) > 500
    assert {text for text, colour in texts if contrast(colour, background) < 4.5} == set()
    assert "lora" in {text for text, _ in texts}


def test_it_asks_nothing_of_the_network_and_logs_no_error(browser: webdriver.Chrome, page: str) -> None:
    logs: Any = browser  # its get_log has no types
    logs.get_log("performance"), logs.get_log("browser")
    show(browser, page)
    for button in browser.find_elements(By.CSS_SELECTOR, "#main-table button"):
        button.click()
    assert logs.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in logs.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page in requested
    assert all(url.startswith(("file:", "data:")) for url in requested), requested
