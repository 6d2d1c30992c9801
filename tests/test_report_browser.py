"""The page in a browser: every tab opens, filters and keys work, answers replay, and nothing a model wrote runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from fluid_eval.output.report import write_report
from fluid_eval.results.run_folder import encode, read_samples, write_json

from .runs import HOSTILE, SCORED, WRITTEN, write_run

pytestmark = pytest.mark.browser
ALL = WRITTEN + SCORED


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it, or as Playwright installed it."""
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            elements = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no browser starts here: {str(error).splitlines()[0]}")
        yield elements
        elements.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a page of one run, and of one of three."""
    top = tmp_path_factory.mktemp("pages")
    runs = [write_run(top / name, name, model=f"models/{name}") for name in ("ar", "fluid", "llada")]
    write_report(runs[1:2], top / "one.html")
    write_report(runs, top / "three.html")
    return {name: (top / f"{name}.html").as_uri() for name in ("one", "three")}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page; no error and no word on the console is forgiven, nor a request for anything but the page."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(30_000)
        opened, complaints = context.new_page(), list[str]()
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("dialog", lambda dialog: complaints.append(dialog.message))
        opened.on("request", lambda request: complaints.append(request.url) if "html" not in request.url else None)
        yield opened
    assert complaints == []


def selected(page: Page) -> str:
    return page.get_by_role("tab", selected=True).inner_text()


@pytest.mark.parametrize("name", ["one", "three"])
def test_every_tab_opens_by_pointer_and_by_keys(page: Page, pages: dict[str, str], name: str) -> None:
    page.goto(pages[name])
    tabs = page.get_by_role("tab").all()
    assert selected(page) == "Summary"
    for tab in tabs:
        tab.click()
        expect(page.get_by_role("tabpanel")).to_have_count(1)
        expect(page.get_by_role("tabpanel").get_by_role("heading", level=2)).to_have_text(tab.inner_text())
        assert page.url.endswith("#" + (tab.get_attribute("aria-controls") or "").replace("summary", ""))
    tabs[0].focus()
    for tab in [*tabs[1:], tabs[0]]:
        page.keyboard.press("ArrowRight")
        expect(tab).to_be_focused()
        expect(tab).to_have_attribute("aria-selected", "true")
    page.keyboard.press("End")
    assert selected(page) == "Protocol and environment"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    assert selected(page) == "Summary"


def test_what_matters_is_seen_on_paper_and_on_a_telephone(browser: Browser, tmp_path: Path) -> None:
    """No table leaves the printed page; on a telephone a run's long name leaves room for its score."""
    decoders = ["ar", "fluid", "llada"] * 3
    runs = [
        write_run(tmp_path / f"{n}", name, model=f"models/{'a-long-name-' * 4}{n}") for n, name in enumerate(decoders)
    ]
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        fields = {f"field{n}": "some words of a setting " * n for n in range(12)}
        tasks = {task: {"task": task, **fields} for task in ("gsm8k", "mmlu")}
        write_json(run / "result.json", result | {"protocol": {**result["protocol"], "tasks": tasks}})
    write_report(runs, tmp_path / "page.html")
    with browser.new_context(viewport={"width": 794, "height": 1123}) as context:
        page = context.new_page()
        page.goto((tmp_path / "page.html").as_uri())
        page.emulate_media(media="print")
        widths = "all => all.map(one => [one.ariaLabel, one.scrollWidth - one.clientWidth])"
        assert [elements for elements in page.locator(".wide").evaluate_all(widths) if elements[1] > 0] == []
        page.emulate_media(media="screen")
        page.set_viewport_size({"width": 390, "height": 844})
        box = page.get_by_role("region", name="Runs").locator("tbody tr").first.locator("td.num").first.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 390


BEYOND = """
(panel) => [...panel.querySelectorAll("*")]
  .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((one) => `${one.tagName}.${one.className} ends at ${Math.round(one.getBoundingClientRect().right)}`)
"""


def test_a_sweep_s_samples_fit_their_window(browser: Browser, tmp_path: Path) -> None:
    """Nine points, long texts of choices, samples closed and open: nothing is cut, and nothing scrolls sideways."""
    runs = [write_run(tmp_path / f"{n}", ("ar", "fluid", "llada")[n % 3], model=f"models/m{n}") for n in range(9)]
    for run in runs:
        records = list(read_samples(run))
        for record in records:
            if "choices" in record:
                record["choices"] = [f" {'a choice is a sentence, and has many words, ' * 4}{n}" for n in range(2)]
                record["output"] = record["target"] = record["choices"][0]
        (run / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    write_report(runs, tmp_path / "page.html")
    for width in (1280, 800):
        with browser.new_context(viewport={"width": width, "height": 900}) as context:
            context.set_default_timeout(120_000)  # nine runs on a page: a busy machine takes long to open it
            page = context.new_page()
            for state in ("", "&page=2", "&key=gsm8k/3", "&key=mmlu_anatomy/3"):  # one alone is open
                page.goto("about:blank")
                page.goto((tmp_path / "page.html").as_uri() + f"#samples{state}")
                page.locator("#list > li").first.wait_for()
                assert page.locator("#samples").evaluate(BEYOND) == [], (width, state)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, (width, state)
                assert page.locator(".preview").first.bounding_box()["width"] > 100, (width, state)  # type: ignore[index]


def test_without_javascript_it_is_one_long_page(browser: Browser, pages: dict[str, str]) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(pages["three"])
        for panel in page.locator(".panel").all():
            expect(panel).to_be_visible()
        expect(page.get_by_text("The list of samples needs JavaScript")).to_be_visible()
        assert page.get_by_role("link", name="Health", exact=True).get_attribute("href") == "#health"


ADDRESSES = {
    "#samples": f"1–25 of {ALL} that match, of {ALL} samples",
    "#samples&page=2": f"26–{ALL} of {ALL} that match, of {ALL} samples",
    "#samples&task=gsm8k&gate=length+limit": f"1–3 of 3 that match, of {ALL} samples",
    "#samples&gate=empty%20answer": f"1–1 of 1 that match, of {ALL} samples",
    "#task=mmlu&score=right&open=1": f"1–6 of 6 that match, of {ALL} samples",
    "#samples&gate=prompt+truncated&q=NUMBER": f"1–1 of 1 that match, of {ALL} samples",
    "#samples&q=nowhere&gate=no-such-gate": f"None of {ALL} samples matches.",
    "#samples&key=gsm8k/11": f"1–1 of 1 that match, of {ALL} samples (only gsm8k/11; clear the filters",
}


def test_an_address_says_what_is_shown(page: Page, pages: dict[str, str]) -> None:
    for address, count in ADDRESSES.items():
        page.goto("about:blank")  # or only the fragment changes, and nothing is loaded
        page.goto(pages["one"] + address)
        assert selected(page) == "Samples", address
        expect(page.locator("#count"), address).to_contain_text(count)
        low, _, high = count.split()[0].partition("–")
        expect(page.locator("#list > li"), address).to_have_count(int(high) - int(low) + 1 if high else 0)
        if "open=1" in address:
            expect(page.locator(".sample")).to_have_count(6)
            expect(page.locator(".choices tr", has_text="-inf")).to_have_count(6)


def test_filters_and_search(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["three"] + "#samples")
    verdicts = page.evaluate(
        "JSON.parse(document.getElementById('data').textContent).samples.map((sample) =>"
        " sample.answers.map((answer) => Object.values(answer.scores)[0] === 1))"
    )
    expected = {
        "flipped": sum(len(set(elements)) == 2 for elements in verdicts),
        "allwrong": sum(not any(elements) for elements in verdicts),
        "lostC": sum(elements[0] and not elements[2] for elements in verdicts),
        "gainedB": sum(not elements[0] and elements[1] for elements in verdicts),
    }
    assert min(expected.values()) > 0
    for value, number in expected.items():
        page.locator("#score").select_option(value)
        expect(page.locator("#count")).to_contain_text(f"of {number} that match")
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Search in prompts and answers").fill("First 12 OF")
    expect(page.locator("#count")).to_contain_text("1–1 of 1 that match")
    assert "q=First+12+OF" in page.url
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("link", name="lost").first.click()
    expect(page.get_by_role("tab", selected=True)).to_have_text("Samples")
    assert page.locator("#score").input_value().startswith("lost")


def test_hostile_answers_stay_text(page: Page, pages: dict[str, str]) -> None:
    for name in ("one", "three"):
        page.goto(pages[name] + "#samples&q=pwned&open=1")
        page.reload()
        text = page.locator(".tokens").first
        assert "".join(text.locator(".box:not(.off)").all_text_contents()) == HOSTILE
        expect(page.locator("img, #list script, [onerror], [onmouseover]")).to_have_count(0)
        text.hover()
        assert "pwned" not in page.title()


def test_an_answer_replays_forward_by_forward(page: Page, pages: dict[str, str]) -> None:
    page.goto(pages["one"] + "#samples&key=gsm8k/11")
    sample = page.evaluate("JSON.parse(document.getElementById('data').textContent).samples[11].answers[0]")
    all_ = sum(sample["forwards"].values())
    slider = page.get_by_role("slider", name="Forward")
    later, current = page.locator(".tokens .box.later"), page.locator(".tokens .box.current")
    expect(later).to_have_count(0)
    assert f"{sample['tokens']} tokens in {all_} forwards" in (slider.get_attribute("aria-valuetext") or "")
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "nothing written yet"
    expect(page.locator(".tokens .box:not(.later)")).to_have_count(0)
    seen = ""
    for forward in range(1, all_ + 1):
        page.keyboard.press("ArrowRight")
        texts = slider.get_attribute("aria-valuetext") or ""
        assert texts.startswith(f"forward {forward} of {all_} ({'prefill' if forward == 1 else 'round'})")
        seen += "".join(current.all_text_contents())
        assert ("wrote nothing" in texts) == (current.count() == 0)
        expect(page.locator(".tokens .current.later")).to_have_count(0)
    assert seen == sample["text"]
    expect(page.locator(".tokens .off")).to_have_count(0)
    page.locator(".tokens .box").first.click()
    assert (slider.get_attribute("aria-valuetext") or "").startswith("forward 2 of")
    expect(slider).to_be_focused()
    page.keyboard.press("End")
    drafts = page.locator(".tokens del")
    assert drafts.count() == len(sample.get("rejected", [])) > 0
    expect(drafts.first).to_be_hidden()
    page.get_by_label("rejected draft").check()
    expect(drafts.first).to_be_visible()
    assert drafts.first.text_content() == sample["rejected"][0][3]


def test_answers_race_unless_motion_is_not_wanted(page: Page, pages: dict[str, str]) -> None:
    page.clock.install(time=0)
    page.goto(pages["three"] + "#samples&key=gsm8k/3")
    page.clock.pause_at(60_000)
    expect(page.locator(".tokens .off").first).to_have_text("</s>")  # a stop string is no part of the answer
    sliders = page.get_by_role("slider")
    page.get_by_role("button", name="Play all answers together").click()
    page.clock.run_for(5 * 150)
    assert [slider.input_value() for slider in sliders.all()] == ["5", "5", "5"]
    page.get_by_role("button", name="Pause all answers together").click()
    page.clock.run_for(1000)
    assert sliders.first.input_value() == "5"
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    page.get_by_role("button", name="Next forward answer B").click()
    page.clock.run_for(1000)
    assert sliders.nth(1).input_value() == "1"


def test_themes(page: Page, pages: dict[str, str]) -> None:
    def paper() -> int:
        return int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))

    page.emulate_media(color_scheme="dark")
    page.goto(pages["one"])
    assert paper() < 50
    button = page.get_by_role("button", name="Theme")
    button.click()
    assert paper() > 200
    assert "theme=light" in page.url
    page.reload()
    assert paper() > 200
    button.click()
    page.emulate_media(color_scheme="light")
    assert paper() < 50
    page.get_by_role("tab", name="Health").click()
    page.get_by_role("link", name="show").first.click()
    expect(page.get_by_role("tab", selected=True)).to_have_text("Samples")
    assert paper() < 50  # a link on the page keeps the theme


@pytest.mark.parametrize(("name", "scheme"), [("three", "light"), ("one", "dark")])
def test_nothing_that_axe_finds(page: Page, pages: dict[str, str], name: str, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(pages[name] + "#samples&key=gsm8k/11")
    page.get_by_label("rejected draft").check()
    page.evaluate("for (const panel of document.querySelectorAll('.panel')) panel.hidden = false")
    elements = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(one["id"], node["html"], node["failureSummary"]) for one in elements for node in one["nodes"]] == []


def test_a_narrow_page_scrolls_only_down_and_all_of_it_prints(page: Page, pages: dict[str, str]) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(pages["three"] + "#samples&key=gsm8k/11")
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.emulate_media(media="print")
    for panel in page.locator(".panel").all():
        expect(panel).to_be_visible()
    assert page.pdf().startswith(b"%PDF")
