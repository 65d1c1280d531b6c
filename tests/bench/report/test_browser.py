"""The page in a real browser without a network: charts, phone size, keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated import HOSTILE, Bench, answers, fill

from untrigger.bench.report.render import write

pytestmark = pytest.mark.slow
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium with a chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def address(bench: Bench, tmp_path: Path) -> str:
    fill(bench)
    bench.cell("paper (x)" * 9, 0.4, answers=answers(HOSTILE + "long" * 60))
    for attack in ("sig", "blended"):
        bench.pair(attack=attack)
        for name in ("abl", "byorn", "crow", "patch-aug", "two-view"):
            bench.cell(name, 0.2, quality=0.9, attack=attack)
    write([bench.root], tmp_path / "report.html")
    return (tmp_path / "report.html").as_uri()


def opened(browser: Any, address: str, size: tuple[int, int], scheme: str = "light") -> Any:
    """Open the page offline in a window of ``size`` CSS pixels, and wait for its charts."""
    from selenium.webdriver.support.ui import WebDriverWait

    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    browser.get("about:blank")
    browser.get_log("browser")  # discards messages of the page before
    browser.get(address)
    drawn = "return [...document.querySelectorAll('[data-figure]')].every((e) => e.querySelector('.main-svg'))"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn))
    return browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_is_drawn_and_fits(browser: Any, address: str, size: tuple[int, int], scheme: str) -> None:
    opened(browser, address, size, scheme)
    assert browser.execute_script("return document.querySelectorAll('[data-figure]').length") == 3
    count_points = "return document.querySelectorAll('[data-figure=pareto] .scatterlayer .point').length"
    assert browser.execute_script(count_points) == 3 + 1 + 2 * 7, "a point for each cell that counts"
    assert (
        browser.execute_script("return document.querySelectorAll('[data-figure=\"view-0\"] .barlayer .point').length")
        == 4
    )
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    needed, given = browser.execute_script(widths)
    assert needed <= given, "only tables scroll sideways, each in its box"
    overflowing = (
        "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.scroll, svg, .hidden, [data-figure]')).map((e) => e.outerHTML.slice(0, 200))"
    )
    assert browser.execute_script(overflowing) == []
    ink, paper = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
    )
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light") and ink != paper
    assert browser.get_log("browser") == []


def test_the_page_makes_no_network_request(browser: Any, address: str) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    opened(browser, address, DESKTOP)
    requests = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()


def test_the_keyboard_reaches_and_opens_a_cell(browser: Any, address: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened(browser, address, DESKTOP)
    keys, active = ActionChains(browser), "return document.activeElement.{}"
    keys.send_keys(Keys.TAB).perform()
    assert browser.execute_script(active.format("className")) == "skip"
    left = browser.execute_script("return document.activeElement.getBoundingClientRect().left")
    assert left >= 0, "the skip link is visible while it has the focus"
    keys.send_keys(Keys.ENTER).perform()
    assert browser.execute_script(active.format("id")) == "main"
    reached: list[str] = []
    for _ in range(200):
        keys.send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script(active.format("tagName")))
        if reached[-1] == "SUMMARY":
            break
    assert reached[0] == "DIV" and "A" in reached and reached[-1] == "SUMMARY", "tables, their links, then a section"
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is visible"
    keys.send_keys(Keys.ENTER).perform()
    assert browser.execute_script(active.format("parentElement.open")) is True


def test_a_figure_links_to_its_section(browser: Any, address: str) -> None:
    opened(browser, address, PHONE)
    figure = "document.querySelector('.heat td.h10 a')"
    browser.execute_script(f"{figure}.click()")
    section = f"document.getElementById({figure}.getAttribute('href').slice(1))"
    query = f"return [{section}.closest('details').open, {section}.getBoundingClientRect().top, innerHeight]"
    is_open, top, height = browser.execute_script(query)
    assert is_open and -1 <= top < height
