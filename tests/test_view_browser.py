"""The viewer in a browser: list, filter, compare, open a report, watch a running one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from .runs import write_run
from .test_report_browser import browser as browser
from .viewing import viewer, write_folder

pytestmark = pytest.mark.browser
expect.set_options(timeout=60_000)  # a report is written when it is asked for


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with viewer(root) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page; no error and no word on the console is forgiven."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(60_000)
        opened, complaints = context.new_page(), list[str]()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        yield opened
    assert complaints == []


def test_a_filtered_list_leads_to_a_comparison(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("tbody tr")).to_have_count(6)
    page.get_by_label("Words").fill("finished")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    for box in page.get_by_role("checkbox", name="compare").all():
        box.check()
    page.get_by_role("button", name="Compare").click()
    page.locator("#tab-compare").click()
    expect(page.locator("#compare table").first).to_be_visible()


def test_a_report_opens_with_its_script(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("link", name="deep/fluid").click()
    page.locator("#tab-samples").click()
    expect(page.locator("#samples")).to_be_visible()
    expect(page.locator("#summary")).to_be_hidden()


def test_a_running_one_is_watched(page: Page, root: Path, address: str) -> None:
    page.goto(f"{address}/of/running")
    expect(page.get_by_text("42 answers so far")).to_be_visible()
    samples = root / "running" / "samples.jsonl"
    with samples.open("ab") as more:
        more.write(samples.read_bytes().splitlines(keepends=True)[0])
    expect(page.get_by_text("43 answers so far")).to_be_visible()


def test_everyone_can_read_it(page: Page, address: str, tmp_path: Path) -> None:
    for path in ("/", "/of/stopped"):
        page.goto(address + path)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_names_are_only_text(browser: Browser, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_run(root / "<img src=x onerror=alert(1)>", "ar")
    with viewer(root) as address, browser.new_context() as context:
        opened, dialogs = context.new_page(), list[str]()
        opened.on("dialog", lambda dialog: dialogs.append(dialog.message))
        opened.goto(address)
        opened.get_by_role("link", name="onerror").click()
        expect(opened.locator("#summary")).to_be_visible()
        assert dialogs == []
