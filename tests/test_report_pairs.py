"""What a report says of runs held against another: never more than that they were asked alike allows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from fluid_eval.cli.main import main
from fluid_eval.output.report import facts, setup, write_report
from fluid_eval.output.report.runs import read_runs
from fluid_eval.output.terminal import difference, probability
from fluid_eval.results import speed_repeats
from fluid_eval.results.run_folder import write_json
from fluid_model.common.errors import ConfigError

from .pages import Outline
from .runs import WRITTEN, write_run, written


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A slow run that is always wrong, and a fast one that is always right."""
    top, rng = tmp_path_factory.mktemp("pair"), random.Random(4)
    answers = [written(n, "fluid", rng) for n in range(WRITTEN)]
    for name, right, slower in (("base", 0.0, 9), ("other", 1.0, 1)):
        write_run(top / name, records=[{**one, "scores": dict.fromkeys(one["scores"], right)} for one in answers])
        for number in range(3):  # timed in turns
            seconds = {one["key"]: one["seconds"] * slower * (number + 1) for one in answers}
            speed_repeats.append(top / name, speed_repeats.Repeat("s", number, seconds))
    return [top / "base", top / "other"]


def test_runs_asked_otherwise_are_not_compared_unasked(pair: list[Path], tmp_path: Path) -> None:
    gathered = facts.gather(read_runs(pair)[0], None)
    assert gathered.verdicts[0].state == "good"
    assert gathered.placed[0].dominated_by == gathered.placed[1].name
    file = pair[1] / "result.json"
    before = file.read_text()
    result = json.loads(before)
    result["protocol"]["tasks"]["gsm8k"]["num_fewshot"] = 0
    write_json(file, result)
    try:
        files = [tmp_path / name for name in ("page.html", "page.md", "page.tex")]
        words = [*map(str, pair), "-o", str(files[0]), "--markdown", str(files[1]), "--latex", str(files[2])]
        for more, compared in (([], False), (["--across-protocols"], True)):
            assert main(["report", *words, *more]) == 0
            page, markdown, latex = (path.read_text(encoding="utf-8") for path in files)
            for text in (page, markdown, latex):
                assert re.search(r"num(\\)?_fewshot: 5 / 0", text)
                assert "Protocols differ" in text
            assert ('id="compare"' in page, "## Differences" in markdown) == (compared, compared)
            assert markdown.index("Protocols differ (") < (markdown + "## Differences").index("## Differences")
            gathered = facts.gather(read_runs(pair)[0], None, across_protocols=compared)
            assert (gathered.verdicts[0].state, gathered.verdicts[0].word) == ("warn", "Protocols differ")
            scores = [one for one in gathered.verdicts if one.about.startswith("Score")]
            assert [one.state for one in scores] == ["none"] * compared
            assert {place.dominated_by for place in gathered.placed} == {None}
    finally:
        file.write_text(before)


def test_one_address_tells_differences_and_one_task_once(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Terminal, page and appendix print one difference in the same words; of one task there is no second line."""
    one = [write_run(tmp_path / name) for name in ("base", "other")]
    for old, new in zip(pair, one, strict=True):
        stored = (old / "samples.jsonl").read_bytes().splitlines(keepends=True)[:WRITTEN]
        (new / "samples.jsonl").write_bytes(b"".join(stored))
        result = json.loads((old / "result.json").read_text())
        write_json(new / "result.json", result | {"lines": result["lines"][:2], "members": {"gsm8k": ["gsm8k"]}})
    for runs, tasks in ((pair, ["gsm8k", "mmlu", "all"]), (one, ["gsm8k"])):
        files = tmp_path / "page.html", tmp_path / "page.md"
        write_report(runs, files[0], markdown=files[1])
        assert main(["compare", "--json", *map(str, runs)]) == 0
        (gathered,) = json.loads(capsys.readouterr().out)["pairs"]
        lines = [difference(row["difference"]) for row in [*gathered["tasks"], gathered["all"]][: len(tasks)]]
        page, markdown = (file.read_text(encoding="utf-8") for file in files)
        rows = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| B - A")]
        assert [(row[1], row[3]) for row in rows] == list(zip(tasks, lines, strict=True))
        rows = [row for row in Outline(page).rows if row and row[-1].endswith("lost")]
        assert [row[4] for row in rows] == lines
        heads = [name.replace("all", "mean over tasks") for name in tasks]
        assert all(row[0].startswith(head) for row, head in zip(rows, heads, strict=True))
        assert main(["compare", *map(str, runs)]) == 0
        out = capsys.readouterr().out
        assert all(one in out for one in lines)


def test_differences_and_p_values() -> None:
    assert difference({"mean": -0.0237, "low": -0.048, "high": -0.0001}) == "-2.4 [-4.8, 0.0]"
    assert difference({"mean": 0.0, "low": 0.0, "high": 1.0}) == "+0.0 [0.0, 100.0]"
    assert list(map(probability, (None, 0.0004, 0.001, 1.0))) == ["–", "<.001", "0.001", "1.000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no claims"),
        ('{"rows": [], "lint": []}', "holds no claims"),
        ('{"rows": [{"table": "tiny"}]}', "holds no claims"),
        ('{"rows": [{"table": "tiny"}], "lint": []}', r"rows\[0\] lacks convention, measured, metric"),
        ('{"rows": [7], "lint": []}', r"rows\[0\] lacks convention"),
    ],
)
def test_claims_that_are_none_are_refused(pair: list[Path], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"claims.json: {message}"):
        write_report(pair[:1], tmp_path / "page.html", claims=tmp_path / "claims.json")
    assert not (tmp_path / "page.html").exists()


def test_a_protocol_says_once_what_all_tasks_have_in_common(pair: list[Path]) -> None:
    ((run,), _) = read_runs(pair[:1])
    tasks = {"x": {"shots": 5, "until": ["a"], "chat": None}, "y": {"shots": 0, "until": ["a"], "chat": None}}
    run.result["protocol"]["tasks"] = tasks
    shared = {"until": "a", "chat": "–"}
    assert list(setup.protocol(run).items()) == [("all tasks", shared), ("x", {"shots": "5"}), ("y", {"shots": "0"})]
    run.result["protocol"]["tasks"] = {"x": tasks["x"]}
    assert setup.protocol(run) == {"x": {"shots": "5", **shared}}
    run.result["protocol"] = None
    assert setup.protocol(run) == {}
