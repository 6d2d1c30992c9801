"""The report: one page that stands alone, tells what the run folders tell, and runs nothing a model wrote."""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from fluid_eval.cli.main import main
from fluid_eval.output.figures import tokens_per_forward
from fluid_eval.output.report import samples, write_report
from fluid_eval.output.report.facts import AUDIT_STATES, audit_state
from fluid_eval.output.report.runs import read_runs
from fluid_eval.results.run_folder import write_json
from fluid_model.common.errors import ConfigError

from .pages import Outline, embedded, unpack
from .runs import HALF, HOSTILE, SCORED, SHARED, WRITTEN, write_run, written

CLAIM = {
    "table": "tiny", "system": "ours", "task": "gsm8k", "metric": "exact_match", "published": 61.8, "unit": "%",
    "published_to": None, "profile": None,
    "convention": {"published": "5-shot", "measured": "0-shot"}, "source": "a paper", "note": "", "run": None,
    "measured": {"score": 0.7, "low": 0.5, "high": 0.85, "n": 30}, "verdict": "reproduced",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Tests that break it take a copy."""
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_stands_alone(page: str) -> None:
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"url\((?!#)|@import", page)
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page


def test_hostile_text_is_only_text(page: str) -> None:
    tags = [tag for tag, _ in Outline(page).tags]
    assert tags.count("script") == 2  # the samples and the page's own
    assert "img" not in tags
    assert "<b>7B" not in page
    assert "<i>cut" not in page
    first = embedded(page)["samples"][0]["answers"][0]
    assert first["text"].startswith(HOSTILE)
    assert first["extracted"]["flexible-extract"] == HOSTILE


def test_tables_say_what_the_result_says(page: str, folder: Path) -> None:
    rows = [[" ".join(cell.split()) for cell in row] for row in Outline(page).rows]
    strict, flexible, mmlu = json.loads((folder / "result.json").read_text())["lines"]

    def score(line: dict[str, Any]) -> str:
        return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"

    speed = [f"{strict['tokens_per_forward']:.2f}", f"{strict['tokens_per_second']:,.0f}"]
    cost = [*speed, "1", str(strict["length_limit_hits"])]
    kinds = ["30", f"{strict['forwards_by_kind']['round']}"]
    assert [
        "gsm8k",
        f"{strict['tokens']:,}",
        *kinds,
        f"{strict['forwards']:,}",
        f"{strict['slots_per_token']:.1f}",
    ] in rows
    assert ["mmlu", "0", "24", "0", "24", "–"] in rows
    assert strict["length_limit_hits"] == 3
    assert ["gsm8k", "exact_match strict-match", score(strict), "", "30", *cost] in rows
    assert ["exact_match flexible-extract", score(flexible), "", "30"] in rows
    assert ["mmlu", "acc", score(mmlu), "", "12", "–", "–", "0", "0"] in rows
    assert ["mmlu_anatomy", "acc", score(mmlu), "", "12", "0", "24"] in rows
    assert [
        "prompt truncated",
        "gsm8k",
        "1",
        "30",
        "3.3%",
        "1.0%",
        "✗ failed",
        "show prompt truncated in gsm8k",
    ] in rows
    place = rows.index(["num_fewshot", "5"])
    assert rows[place - 1] == ["gsm8k"]
    assert rows[place + 1 : place + 3] == [["until", "'\\n\\n', '</s>'"], ["extractors", "strict-match: #### n"]]
    assert ["torch", "2.13.0"] in rows
    assert ["commit", "abc, with uncommitted changes"] in rows
    for text in ("took 1 min 15 s", "limit = 30", "WARNING: 3 rows that are not canonical", "0123456789ab"):
        assert text in page
    assert "(template 872be49dbb63). Started 2026-11-21 03:40:03 UTC" in " ".join(page.split())
    assert "prefill and commit included (papers often leave prefill out)" in page
    assert html.escape("the last line was <i>cut</i> short") in page


def test_samples_keep_what_matters(page: str, folder: Path) -> None:
    data = embedded(page)
    assert [(task["name"], task["owner"]) for task in data["tasks"]] == [("gsm8k", "gsm8k"), ("mmlu_anatomy", "mmlu")]
    assert data["tasks"][0]["shared"] == SHARED
    assert len(data["samples"]) == WRITTEN + SCORED
    second, last = data["samples"][1], data["samples"][-1]
    assert second["prompt"] == "Question: number 1\nAnswer:"
    assert data["samples"][2]["prompt"] == f"Question: number 2{HALF}\nAnswer:"
    assert (second["answers"][0]["cut"], second["answers"][0]["finish"]) == (7, "stop")
    assert last["answers"][0]["loglikelihoods"][0] == "-inf"  # JSON has no infinities
    assert "cut" not in last["answers"][0]
    for record, sample in zip(read_runs([folder])[0][0].records, data["samples"][:WRITTEN], strict=False):
        (entry,) = sample["answers"]
        if not record["pieces"]:
            continue
        start, end = entry["span"]
        ends = list(accumulate(unpack(entry["lengths"])))
        text = entry["text"].encode("utf-16-le", "surrogatepass")  # as a browser counts
        pieces = [text[2 * a : 2 * b].decode("utf-16-le", "surrogatepass") for a, b in pairwise([0, *ends])]
        assert pieces == record["pieces"]
        assert list(accumulate(unpack(entry["written"]))) == record["trace"]["written"]
        assert text[2 * start : 2 * end].decode("utf-16-le", "surrogatepass") == record["output"]
        assert start == 0 or start > len(record["output"])
        assert (start > 0) == (record["key"] == "gsm8k/5")  # which thinks first, in the answer's own words
        drafts = [[forward, place, len(ids)] for forward, place, ids in record["trace"]["rejected"]]
        assert [one[:3] for one in entry.get("rejected", [])] == drafts


def test_packing_loses_nothing() -> None:
    rng = random.Random(0)
    values = [0, 1, -1, 15, 16, -16, 31, 32, *(rng.randint(-(10**6), 10**6) for _ in range(200))]
    assert unpack(samples.pack(values)) == values
    assert len(samples.pack(range(-15, 16))) == 31  # small ones take a letter each


def test_long_answers_lose_their_middle_between_tokens(folder: Path) -> None:
    rng = random.Random(1)
    text = "".join(rng.choices(["a word ", "or 😀 ", "two\n"], k=1500))
    record = written(4, "fluid", rng, text)
    entry = samples._written(record, 6000, True)
    head, left_out, tail = entry["text"]
    at, many = entry["skip"]
    assert max(map(samples._units, (head, tail))) <= 3000 < samples._units(head) + 20
    assert [samples._units(text) for text in ("é", "😀", HALF)] == [1, 2, 1]  # as a browser counts
    assert head == "".join(record["pieces"][:at])
    assert tail == "".join(record["pieces"][at + many :])
    assert left_out == samples._units("".join(record["pieces"][at : at + many]))
    assert sum(unpack(entry["lengths"])) == samples._units(head + tail)
    assert list(accumulate(unpack(entry["written"]))) == record["trace"]["written"]
    old = {name: value for name, value in record.items() if name != "pieces"}  # of a run that did not record them
    head, left_out, tail = samples._written(old, 6000, True)["output"]
    assert (len(head), len(tail)) == (3000, 3000)
    assert left_out == len(record["output"]) - 6000


@pytest.mark.slow
def test_a_run_of_a_thousand_samples_stays_below_5_mb(tmp_path: Path) -> None:
    """GSM8K's size: prompts of five examples, answers of 300 tokens of four letters, drafts rejected."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(3000)]

    def text(tokens: int) -> str:
        return " " + " ".join(rng.choices(words, k=tokens))

    examples = "".join(f"Question:{text(45)}\nAnswer:{text(90)}\n\n" for _ in range(5))
    records = []
    for n in range(1000):
        record = written(n, "fluid", rng, text(220)) | {"prompt": f"{examples}Question:{text(45)}\nAnswer:"}
        records.append(record | {"extracted": {"strict-match": "12"}, "target": text(90)})
    assert 290 < sum(len(r["pieces"]) for r in records) / 1000 < 420
    write_report([write_run(tmp_path / "run", records=records)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 5_000_000
    data = embedded(page)
    assert len(data["samples"]) == 1000 + SCORED
    assert sum(len(s["answers"][0].get("lengths", "")) for s in data["samples"]) > 280_000  # traces and all
    assert any("rejected" in s["answers"][0] for s in data["samples"])


def test_what_does_not_fit_is_cut_and_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _ = read_runs([folder])
    complete = samples.block(runs)
    assert (complete.clip, complete.drafts) == (6000, True)
    monkeypatch.setattr(samples, "PAGE_BYTES", len(complete.json) - 10)
    write_report([folder], tmp_path / "page.html")
    assert "Rejected draft tokens are left out" in (tmp_path / "page.html").read_text(encoding="utf-8")
    monkeypatch.setattr(samples, "PAGE_BYTES", 8000)
    small = samples.block(runs)
    assert len(small.json.encode()) <= 8000
    (ours, _), (theirs, _) = small.shares.values()
    assert small.shares == {"gsm8k": (ours, WRITTEN), "mmlu": (theirs, SCORED)}
    assert 0 < ours + theirs < WRITTEN + SCORED
    write_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"This page holds {ours + theirs} of {WRITTEN + SCORED} samples" in page


def test_selection_is_even_and_blind_to_scores() -> None:
    sizes = {"humaneval": 164, "gsm8k": 1319, **{f"mmlu_{n}": 246 for n in range(57)}}
    records = [{"task": task, "doc_id": n} for task, size in sizes.items() for n in range(size)]
    owners = {task: task.split("_")[0] for task in sizes}
    shown = samples.select(records, owners, 2000)
    shares = samples._shares(records, shown, owners)
    assert shares == {"humaneval": (164, 164), "gsm8k": (918, 1319), "mmlu": (918, 14022)}
    steps = [record["doc_id"] for record in shown if record["task"] == "gsm8k"]
    assert {after - before for before, after in pairwise(steps)} == {1, 2}


def test_plots_are_the_same_every_time_and_the_pages_own(folder: Path, page: str) -> None:
    figures = re.findall(r"<svg xmlns.*?</svg>", page, re.DOTALL)
    assert len(figures) == 2
    for figure in figures:
        assert "currentColor" in figure
        assert not re.search(r"#[0-9a-f]{6}\b(?<!#b0b0b0)|font-family|<style|<metadata| id=\"\w+_\d", figure)
    write_report([folder], folder / "again.html")
    assert (folder / "again.html").read_text(encoding="utf-8") == page
    line = {"task": "$a<b", "tokens_per_forward": 2.5}
    assert "$a&lt;b" in tokens_per_forward([line])
    assert "2.50" in tokens_per_forward([line])
    assert tokens_per_forward([]) == ""


def test_several_runs_share_a_page(folder: Path, tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", "ar", model="models/parent")
    claims = {"rows": [CLAIM | {"run": str(folder)}, CLAIM | {"verdict": "not run: needs weights", "measured": None}]}
    write_json(tmp_path / "claims.json", claims | {"lint": [{"cells": ["a", "b"], "kind": "clash", "reason": "<why>"}]})
    words = ["--claims", tmp_path / "claims.json", "--markdown", tmp_path / "a.md", "--latex", tmp_path / "a.tex"]
    assert main(["report", str(base), str(folder), "-o", str(tmp_path / "page.html"), *map(str, words)]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = [[" ".join(cell.split()) for cell in row] for row in Outline(page).rows]
    data = embedded(page)
    assert [run["name"] for run in data["runs"]] == ["parent · ar", "FLUID <b>7B · fluid"]
    assert all(len(sample["answers"]) == 2 for sample in data["samples"])
    gsm8k = [s["answers"] for s in data["samples"] if s["task"] == 0]
    strict = [[answer["scores"]["exact_match,strict-match"] for answer in answers] for answers in gsm8k]
    (flipped,) = [row[-1] for row in rows if row[0].startswith("gsm8k") and "gained" in row[-1]]
    assert flipped == f"{strict.count([0, 1])} gained, {strict.count([1, 0])} lost"
    assert ["ours", "gsm8k", "exact_match", "61.8", "70.0 [50.0, 85.0]", "30", "✓ reproduced"] in [r[:7] for r in rows]
    assert "– not run: needs weights" in {row[6] for row in rows if len(row) == 8}
    assert "&lt;why&gt;" in page
    markdown, latex = ((tmp_path / name).read_text() for name in ("a.md", "a.tex"))
    assert "FLUID &lt;b>7B" in markdown
    assert "| not run: needs weights |" in markdown
    assert "Protocol lm-eval, hash 0123456789ab." in markdown
    assert latex.count(r"\\") == 1 + 2 * 3
    assert r"FLUID \textless{}b\textgreater{}7B" in latex


def test_runs_of_other_documents_are_shown_but_not_compared(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    records = [{**written(n, "ar", rng), "target": "another"} for n in range(WRITTEN)]
    apart = write_run(tmp_path / "apart", "ar", records=records)
    lines = (apart / "samples.jsonl").read_bytes().splitlines(keepends=True)[:WRITTEN]  # without the questions
    (apart / "samples.jsonl").write_bytes(b"".join(lines))
    result = json.loads((apart / "result.json").read_text())
    write_json(apart / "result.json", result | {"lines": result["lines"][:2], "members": {"gsm8k": ["gsm8k"]}})
    write_report([folder, apart], tmp_path / "page.html", markdown=tmp_path / "page.md")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="compare"' not in page
    assert "## Differences" not in (tmp_path / "page.md").read_text()
    assert [run["name"] for run in embedded(page)["runs"]] == ["FLUID <b>7B · fluid", "FLUID <b>7B · ar"]


def test_what_was_audited_and_possible_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report([folder], tmp_path / "before.html")
    before = (tmp_path / "before.html").read_text(encoding="utf-8")
    assert "not audited" in before
    assert "The K-head was not measured" in before
    diverging = {
        "key": "gsm8k/4", "place": 3, "context": "<so", "ours": " ", "theirs": "that", "margin": 0.0125,
        "margin_recheck": 0.5, "agrees_in_recheck": False, "verdict": "algorithmic",
    }  # fmt: skip
    audit = {
        "verdict": "algorithmic", "n": 30, "identical": 29, "tokens": 900, "agreeing_tokens": 890, "dtype": "bfloat16",
        "recheck": "float64", "tolerance": 0.05, "divergences": [diverging], "distribution": None,
    }  # fmt: skip
    everywhere = {
        "positions": 500, "predicted": 3.25, "possible": 4.5, "k_star": None, "joint": [[7, 0], [2, 11]],
        "calibration": [{"predicted": 2, "n": 13, "mean_possible": 1.85, "reached": 0.85}],
        "by_step": [{"step": 1, "n": 20, "accepted": 0.9}], "best_fixed": 4, "regret": -0.031,
        "policies": [{"name": "oracle", "forwards_per_token": 0.25, "slots_per_token": 3.5, "cost_per_token": 0.3}],
    }  # fmt: skip
    write_json(folder / "audit.json", audit)
    write_json(folder / "khead.json", {"positions": 500, "slot_budget": 64, "tasks": {"all": everywhere}})
    write_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = [[" ".join(cell.split()) for cell in row] for row in Outline(page).rows]
    assert "29 of 30 answers equal greedy AR&#39;s" in page
    assert "(a difference that rounding does not explain: the decoder writes another text)" in page
    assert ["gsm8k/4", "3", "–", "<so", '" "', '"that"', "0.0125", "0.5000", "differs", "algorithmic"] in rows
    assert "in float64</th>" in page
    assert "in float32" not in page
    assert "rounding explains 0.05 nats" in page
    assert ["all tasks", "500", "3.25", "4.50", "–", "4", "−3.1%"] in rows
    assert ["1", "7", "", "1.00"] in rows
    assert ["2", "2", "11", "1.85"] in rows
    assert "3.1% less a token than the best fixed stride, 4" in page
    records = read_runs([folder])[0][0].records
    rounds = [pair for r in records for pair in zip(r["trace"]["predicted"], r["trace"]["accepted"], strict=True)]
    drafted, accepted = (sum(pair[i] for pair in rounds) / len(rounds) for i in (0, 1))
    text = [str(len(rounds)), f"{drafted:.2f}", f"{accepted:.2f}", f"{100 * accepted / drafted:.0f}%"]
    assert ["all tasks", *text] in rows
    other = write_run(tmp_path / "ar", "ar")
    sampled = {
        "n": 101, "p": 0.4, "p_ranks": 0.2, "rare": 7, "rare_below": 1e-4, "p_rare": 0.9, "enough": 2000, "ok": True,
    }  # fmt: skip
    some = {**audit, "divergences": [], "tolerance": None, "distribution": sampled, "verdict": "undecided"}
    write_json(other / "audit.json", some)
    write_json(folder / "audit.json", {**some, "promises": False, "verdict": "different"})
    (other / "khead.json").write_bytes((folder / "khead.json").read_bytes())
    write_report([folder, other], tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text(encoding="utf-8")
    for mark in "AB":
        assert f'Losslessness audit <span class="mark">{mark}</span></h3>' in page
    assert "29 of 30 answers equal AR&#39;s with the same random numbers; distribution: p 0.400 over 101 tokens" in page
    assert '<span class="state none"><span class="sign" aria-hidden="true">–</span> different</span>' in page
    assert "Under 2,000 tokens nothing is decided" in page
    assert 'aria-label="Steps by task, A"' in page
    assert 'aria-label="Steps by task, B"' not in page, "there were none"
    states = {verdict: audit_state({**some, "verdict": verdict}) for verdict in (*AUDIT_STATES, "different")}
    assert list(states.values()) == ["good", "good", "warn", "warn", "bad"]
    assert audit_state({**some, "verdict": "different", "promises": False}) == "none"


def test_names_tell_runs_apart_and_a_sweep_stands_for_its_points(folder: Path, tmp_path: Path) -> None:
    for name, settings in {"one": {"verify": False}, "two": {"verify": True}, "twin": {"verify": True}}.items():
        run = write_run(tmp_path / "points" / name)
        spec = json.loads((run / "spec.json").read_text())
        spec["decoder"] |= settings
        write_json(run / "spec.json", spec)
    (tmp_path / "points" / "begun").mkdir()
    names = [run.name for run in read_runs([tmp_path])[0]]
    same = "FLUID <b>7B · fluid · verify"
    assert names == ["FLUID <b>7B · fluid · no verify", f"{same} · twin", f"{same} · two"]
    assert [run.mark for run in read_runs([folder, tmp_path])[0]] == ["A", "B", "C", "D"]
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([folder, folder])


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    folder, output = write_run(tmp_path / "run"), tmp_path / "page.html"
    with pytest.raises(ConfigError, match="no run here"):
        write_report([tmp_path / "absent"], output)
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"lines": [result["lines"][0] | {"n": 31}]})
    with pytest.raises(ConfigError, match="30 samples of gsm8k, the result has 31"):
        write_report([folder], output)
    (folder / "result.json").write_text('{"lines": []}')
    with pytest.raises(ConfigError, match="lacks data, decoder"):
        write_report([folder], output)
    (folder / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"not finished.*--resume"):
        write_report([folder], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("absent/page.html", "No such file"), ("file/page.html", "Not a directory"), ("folder", "is a folder; pass")],
)
def test_output_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        write_report([folder], tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_report_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys, pathlib, fluid_eval.output.report as r; r.write_report([pathlib.Path(sys.argv[1])], "
        "pathlib.Path(sys.argv[2])); print({'torch', 'lm_eval', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, str(folder), str(folder / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("set()\n", "")
