"""The report in a real browser: charts, filter, sort, opening a clip by keyboard, phone width, dark and print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import browsing
import pytest
from evaluated_run import CLIPS, LABELS, TRACE, clip_name, write_run
from torch.utils.tensorboard import SummaryWriter

from vidreason.datamodules.types import Clip
from vidreason.report import gallery
from vidreason.report.build import gather, write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
browser = browsing.browser
pytestmark = pytest.mark.slow


@pytest.fixture
def report(tmp_path: Path, write_clip: Callable[[Path], Path]) -> Path:
    run = write_run(tmp_path / "x")
    with SummaryWriter(str(run / "stages" / "01_cold" / "tb")) as writer:
        for step in range(30):
            writer.add_scalar("train/reward", step / 30, step)
            writer.add_scalar("train/loss", 1 / (step + 1), step)
    file = write_clip(tmp_path / "a.mp4")
    names = [clip_name("test", number) for number in range(CLIPS)]
    clips = {("test", name): Clip(file, None, name) for name in names}
    with patch.object(gallery, "_clips_of", lambda run: (clips, "")):
        write_report(gather([run]), tmp_path / "report.html")
    return tmp_path / "report.html"


def open_page(browser: sync_api.Browser, report: Path, width: int, scheme: str) -> tuple[sync_api.Page, list[str]]:
    """Opens the report and collects what must not happen: messages, errors, requests of anything but the file."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (problems.append("dialog"), dialog.dismiss()))
    page.on(
        "request", lambda r: None if r.url.startswith(("data:", report.as_uri())) else problems.append(f"loads {r.url}")
    )
    page.goto(report.as_uri())
    for chart in page.locator(".plots").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    return page, problems


def visible(page: sync_api.Page) -> list[str]:
    return [clip.get_attribute("data-name") or "" for clip in page.locator("li.clip:not([hidden])").all()]


def test_filter_sort_and_open(browser: sync_api.Browser, report: Path) -> None:
    page, problems = open_page(browser, report, 1440, "light")
    for table in page.locator(".scroll").all():  # no column is cut
        assert table.evaluate("box => box.scrollWidth - box.clientWidth") <= 0
    names = [clip_name("test", number) for number in range(CLIPS)]
    assert visible(page)[:2] == [names[23], names[22]]
    assert page.locator("#count").inner_text() == f"{CLIPS} of {CLIPS} clips"
    page.locator("#controls [name=result]").select_option("wrong")
    assert visible(page) == [names[23], names[22]]
    page.locator("#controls [name=sort]").select_option("unsure")
    assert visible(page) == [names[22], names[23]]
    page.locator("#controls [name=result]").select_option("right")
    assert visible(page) == names[:22]  # the first clips are the least sure
    page.locator("#controls [name=label]").select_option(LABELS[0])
    assert visible(page) == names[:22:2]
    page.locator("#controls [name=label]").select_option("")
    page.locator("#controls [name=text]").fill(names[7])
    assert visible(page) == [names[7]]
    page.locator("#controls [name=text]").fill("")

    clip = page.locator("li.clip:not([hidden])").first
    assert not clip.locator(".trace").first.is_visible()
    clip.locator("summary").focus()
    page.keyboard.press("Enter")
    assert clip.locator(".trace pre").first.inner_text() == TRACE.replace("{}", LABELS[0])
    assert clip.locator("img").evaluate("image => image.naturalWidth") > 100

    chosen = page.locator('select[data-chart="1"]')
    drawn = page.locator("#chart1 .trace.scatter path.js-line").first
    before = drawn.get_attribute("d")
    assert chosen.locator("option").all_inner_texts()[:2] == [
        "calibration 2 traces, test",
        "zero_shot likelihood, test",
    ]
    chosen.select_option("1")
    page.wait_for_timeout(500)
    assert drawn.get_attribute("d") != before
    # plotly shows the label as it is, and not as HTML
    ticks = page.locator(".plots .ytick text").all_text_contents()
    assert LABELS[0] in ticks
    assert problems == []
    page.close()


def test_phone_dark_and_print(browser: sync_api.Browser, report: Path, tmp_path: Path) -> None:
    page, problems = open_page(browser, report, 390, "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    text = "getComputedStyle(document.querySelector('.plots .xtick text')).fill"
    dark = page.evaluate(text)
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(500)  # waiting for an expression needs eval, which the page forbids
    assert page.evaluate(text) != dark
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"  # dark text on paper
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert problems == []
    page.close()
