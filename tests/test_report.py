"""The report: one page that stands alone, tells what the run folder tells, and runs nothing a model wrote."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fluid_eval import report
from fluid_eval.metrics import lines
from fluid_eval.plots import score_speed, tokens_per_forward
from fluid_eval.report import write_report
from fluid_eval.spec import build_spec
from fluid_eval.store import encode, write_json
from fluid_model.errors import ConfigError

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)><!-- <script> \u2028 &lt;"
HALF = "\ud800"
"""Half a character, as byte-level models can write it: no encoding has it."""
SHARED = "Question: a worked example\nAnswer: as it should be\n" * 9
WRITTEN, SCORED = 30, 12


def written(n: int, rng: random.Random) -> dict[str, Any]:
    kept = [rng.randint(1, 4) for _ in range(5)]
    return {
        "key": f"gsm8k/{n}", "task": "gsm8k", "doc_id": n, "prompt_hash": "0" * 16,
        "prompt": f"{SHARED}Question: number {n}{HALF * (n == 2)}\nAnswer:",
        "prompt_tokens": 90, "truncated": 7 * (n == 1),
        "trace": {
            "forwards": {"prefill": 1, "denoise": 6, "verify": 5, "commit": 0}, "slots": 60,
            "predicted": [4, 4, 4, 4, 4], "accepted": kept[:-1],
        },
        "seconds": 0.01, "output": HOSTILE if n == 0 else f"so it is {n}", "output_ids": list(range(sum(kept))),
        "finish": "length" if n % 10 == 3 else "stop",
        "extracted": {"strict-match": str(n), "flexible-extract": HOSTILE},
        "scores": {"exact_match,strict-match": float(n % 3 == 0), "exact_match,flexible-extract": 1.0},
        "target": f"#### {n}",
    }  # fmt: skip


def scored(n: int, rng: random.Random) -> dict[str, Any]:
    return {
        "key": f"mmlu_anatomy/{n}", "task": "mmlu_anatomy", "doc_id": n, "prompt_hash": "0" * 16,
        "prompt": f"Which?\nA. {n}\nAnswer:", "prompt_tokens": 9, "truncated": 0,
        "trace": {"forwards": {"prefill": 2}, "slots": 20, "predicted": [], "accepted": []}, "seconds": 0.02,
        "output": "B", "output_ids": [], "finish": None, "choices": [" A", " B"],
        "loglikelihoods": [-float("inf"), -rng.random()], "greedy": [False, True],
        "extracted": {"none": "B"}, "scores": {"acc,none": float(n % 2)}, "target": "AB"[n % 2],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run: 30 answers of gsm8k, 12 scored questions of one mmlu subject."""
    rng = random.Random(0)
    run = tmp_path / "run"
    run.mkdir()
    spec = build_spec({"tasks": ["gsm8k", "mmlu"], "model": "models/FLUID <b>7B", "decoder": "fluid", "limit": 30})
    one = [written(n, rng) for n in range(WRITTEN)]
    other = [scored(n, rng) for n in range(SCORED)]
    write_json(run / "spec.json", {"id": spec.id, **spec.to_dict()})
    write_json(run / "environment.json", {"versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "dirty": True}})
    (run / "samples.jsonl").write_bytes(b"".join(map(encode, [*one, *other])))
    result = {
        "spec_id": spec.id, "model": spec.model.path, "decoder": spec.to_dict()["decoder"],
        "started": "2026-11-21T03:40:03+00:00", "wall_seconds": 75.2,
        "lines": [line.to_dict() for line in [*lines("gsm8k", one), *lines("mmlu", other)]],
        "members": {"gsm8k": ["gsm8k"], "mmlu": ["mmlu_anatomy"]},
        "parts": [line.to_dict() for line in lines("mmlu_anatomy", other)],
        "data": ["matches the canonical MMLU test set (14042 rows)", "WARNING: 3 rows that are not canonical"],
        "notices": ["the last line was <i>cut</i> short"],
    }  # fmt: skip
    write_json(run / "result.json", result)
    return run


@pytest.fixture
def page(folder: Path) -> str:
    write_report(folder, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags with their attributes, and the cells of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert not set(found[1]) & set("<>&\u2028\u2029")
    return dict(json.loads(found[1]))


def test_page_stands_alone(page: str) -> None:
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
    assert not re.search(r"url\((?!#)|@import", page)
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page


def test_hostile_text_is_only_text(page: str) -> None:
    tags = [tag for tag, _ in Outline(page).tags]
    assert tags.count("script") == 2  # the samples and the page's own
    assert "img" not in tags
    assert "<b>7B" not in page
    assert "<i>cut" not in page
    sample = embedded(page)["samples"][0]
    assert sample["output"] == HOSTILE
    assert sample["extracted"]["flexible-extract"] == HOSTILE


def test_table_says_what_the_result_says(page: str, folder: Path) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in Outline(page).rows]
    strict, flexible, mmlu = json.loads((folder / "result.json").read_text())["lines"]

    def score(line: dict[str, Any]) -> str:
        return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"

    speed = [f"{strict['tokens_per_forward']:.2f}", f"{strict['tokens_per_second']:,.0f}"]
    cost = [*speed, "1", str(strict["length_limit_hits"])]
    kinds = ["30", "180", "150"]
    assert ["gsm8k", str(strict["tokens"]), *kinds, "360", f"{1800 / strict['tokens']:.1f}"] in rows
    assert ["mmlu", "0", "24", "0", "0", "24", "–"] in rows
    assert strict["length_limit_hits"] == 3
    assert ["gsm8k", "exact_match strict-match", score(strict), "", "30", *cost] in rows
    assert ["exact_match flexible-extract", score(flexible), "", "30"] in rows
    assert ["mmlu", "acc", score(mmlu), "", "12", "–", "–", "0", "0"] in rows
    assert ["mmlu_anatomy", "acc", score(mmlu), "", "12", "0", "24"] in rows
    assert ["torch", "2.13.0"] in rows
    assert ["commit", "abc, with uncommitted changes"] in rows
    assert "took 1 min 15 s" in page
    assert '<p class="warning">WARNING: 3 rows that are not canonical' in page
    assert "Only the first 30 documents" in page
    assert html.escape("the last line was <i>cut</i> short") in page


def test_samples_keep_what_matters(page: str) -> None:
    data = embedded(page)
    assert [(task["name"], task["owner"]) for task in data["tasks"]] == [("gsm8k", "gsm8k"), ("mmlu_anatomy", "mmlu")]
    assert data["tasks"][0]["shared"] == SHARED
    assert len(data["samples"]) == WRITTEN + SCORED
    first, last = data["samples"][1], data["samples"][-1]
    assert first["prompt"] == "Question: number 1\nAnswer:"
    assert data["samples"][2]["prompt"] == f"Question: number 2{HALF}\nAnswer:"
    assert (first["cut"], first["finish"]) == (7, "stop")
    assert (len(first["predicted"]), len(first["accepted"])) == (5, 4)
    assert last["loglikelihoods"][0] == "-inf"  # JSON has no infinities
    assert "cut" not in last


def test_long_texts_lose_their_middle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(random.Random(1).choices("abc ", k=9000))
    record = written(0, random.Random(2)) | {"output": text}
    block, clip = report._samples_block([record], {"gsm8k": "gsm8k"})
    head, left_out, tail = json.loads(block)["samples"][0]["output"]
    assert (clip, len(head), left_out, len(tail)) == (6000, 3000, 3000, 3000)
    assert text.startswith(head)
    assert text.endswith(tail)
    monkeypatch.setattr(report, "PAGE_BYTES", 5000)
    block, clip = report._samples_block([record], {"gsm8k": "gsm8k"})
    assert clip == 3000
    assert len(block) <= 5000


def test_selection_is_even_and_blind_to_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"humaneval": 164, "gsm8k": 1319, **{f"mmlu_{n}": 246 for n in range(57)}}
    records = [{"task": task, "doc_id": n} for task, size in sizes.items() for n in range(size)]
    owners = {task: task.split("_")[0] for task in sizes}
    shown = report.select(records, owners)
    shares = report._shares(records, shown, owners)
    assert shares == {"humaneval": (164, 164), "gsm8k": (918, 1319), "mmlu": (918, 14022)}
    steps = [record["doc_id"] for record in shown if record["task"] == "gsm8k"]
    assert {after - before for before, after in pairwise(steps)} == {1, 2}
    monkeypatch.setattr(report, "MOST_SAMPLES", 20)
    write_report(folder, folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This page holds 20 of 42 samples" in page
    assert "gsm8k 10 of 30; mmlu 10 of 12." in page


def test_plots_are_the_same_every_time_and_the_pages_own() -> None:
    line = {"task": "$a<b", "score": 1.0, "low": 0.8, "high": 1 - 1e-16, "tokens_per_second": 9.0}
    lines_ = [{**line, "tokens_per_forward": 2.5}, {**line, "task": "mmlu", "tokens_per_second": None}]
    svg = score_speed(lines_[:1])
    assert svg == score_speed(lines_[:1])
    assert "currentColor" in svg
    assert "$a&lt;b" in svg
    assert not re.search(r"#0[12]0|font-family|<style|<metadata| id=\"\w+_\d", svg)
    assert score_speed(lines_[1:]) == ""
    assert "2.50" in tokens_per_forward(lines_[:1])
    assert tokens_per_forward([]) == ""


def test_what_is_no_finished_run_is_refused(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="no run here"):
        write_report(tmp_path / "absent", output)
    (folder / "result.json").write_text('{"lines": []}')
    with pytest.raises(ConfigError, match="lacks data, decoder"):
        write_report(folder, output)
    (folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"not finished.*--resume"):
        write_report(folder, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("absent/page.html", "No such file"), ("file/page.html", "Not a directory"), ("folder", "is a folder; pass -o")],
)
def test_output_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        write_report(folder, tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, pathlib, fluid_eval.report as r; r.write_report(pathlib.Path(sys.argv[1]), "
        "pathlib.Path(sys.argv[2])); print({'torch', 'lm_eval', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, str(folder), str(folder / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("set()\n", "")


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("state", "count"),
    [
        ("", "1–25 of 42 that match, of 42 samples"),
        ("#page=2", "26–42 of 42 that match, of 42 samples"),
        ("#task=gsm8k&show=limit", "1–3 of 3 that match, of 42 samples"),
        ("#task=mmlu&score=right&open=1", "1–6 of 6 that match, of 42 samples"),
        ("#show=cut&q=NUMBER", "1–1 of 1 that match, of 42 samples"),
        ("#q=pwned&open=1", "1–1 of 1 that match, of 42 samples"),
        ("#q=nowhere", "None of 42 samples matches."),
    ],
)
def test_in_a_browser(folder: Path, page: str, tmp_path: Path, state: str, count: str) -> None:
    """The list shows what the address asks for; nothing the model wrote runs; the browser has no complaint."""
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=2000 --dump-dom"
    )
    address = (folder / "report.html").as_uri() + state
    words = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", address]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    assert "<title>FLUID &lt;b&gt;7B, fluid: gsm8k, mmlu</title>" in dom
    assert f'aria-live="polite">{count}</p>' in dom
    low, _, high = count.split()[0].partition("–")
    assert dom.count("<li><details") == (int(high) - int(low) + 1 if high else 0)
    if "open=1" in state:
        assert dom.count('<div class="sample">') == dom.count("<li><details")
    if "task=mmlu" in state:
        assert dom.count("<td>-inf</td><td></td>") == dom.count("<td>chosen</td>") == 6
    if "pwned" in state:
        assert html.escape(HOSTILE, quote=False) in dom
        assert "<dd>5 rounds; on average 4.00 drafted" in dom
