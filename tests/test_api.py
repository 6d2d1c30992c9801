"""The Python API: what the commands do, as functions with typed results; the notebook and the page that show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fluid_eval
from fluid_eval import ConfigError, ProgressEvent
from fluid_eval.cli.main import main
from fluid_eval.output.terminal_results import print_result
from fluid_eval.results.run_folder import RESULT, read_samples

from . import notebooks
from .runs import write_run

TASKS = "mini_gsm8k_1,mini_mmlu_1"


@pytest.fixture(scope="module")
def settings(tiny_fluid):
    """Of runs that take a moment."""
    return {"tasks": TASKS, "model": tiny_fluid, "limit": 6, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def result(settings, tmp_path_factory):
    return fluid_eval.run(**settings, out=tmp_path_factory.mktemp("runs") / "fluid")


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    events: list[ProgressEvent] = []
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    grid = {"decoder.verify": (True, False)}
    done = fluid_eval.sweep(
        **settings, grid=grid, points=[{"decoder.name": "ar"}], by="tokens_per_forward", out=folder,
        progress=events.append,
    )  # fmt: skip
    return done, events


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, fluid_eval; print(*sorted({'torch', 'pandas', 'lm_eval', 'rich'} & {*sys.modules}));"
        "assert {*fluid_eval.__all__} <= {*dir(fluid_eval)}; [getattr(fluid_eval, n) for n in fluid_eval.__all__];"
        "print(*sorted({'torch', 'lm_eval'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "\n\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fluid_eval.nothing


def test_a_run_is_the_commands(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = fluid_eval.run(**settings)
    assert ours.folder.parts[0] == "runs"
    capsys.readouterr()
    words = ["--tasks", TASKS, "--model", str(settings["model"]), "--limit", "6", "--max-new-tokens", "6"]
    assert main(["run", *words, "--resume", "--json"]) == 3
    theirs = json.loads(capsys.readouterr().out)
    assert theirs == ours.values, "the command finds the API's folder, and its result"
    again = fluid_eval.run(**settings, resume=True)
    assert (again, again.rows[0].cost) == (ours, ours.rows[0].cost)


def test_a_result_has_a_type_for_each_value(result):
    assert fluid_eval.load_run(str(result.folder)) == result
    assert [(row.task, row.n) for row in result.rows] == [("mini_gsm8k_1", 6), ("mini_gsm8k_1", 6), ("mini_mmlu_1", 6)]
    assert result.row("mini_mmlu_1") == result.row("mini_mmlu_1", "acc") == result.rows[-1]
    with pytest.raises(ConfigError, match="no row of gsm8k; known: mini_gsm8k_1 exact_match"):
        result.row("gsm8k")
    records = {record["key"]: record for record in read_samples(result.folder)}
    assert [sample.key for sample in result.samples] == list(records)
    for sample in result.samples:
        record = records[sample.key]
        assert (list(sample.output_ids), sample.scores) == (record["output_ids"], record["scores"])
        assert sample.forwards == record["trace"]["forwards"]
        assert (sample.target, list(sample.choices)) == (record["target"], record.get("choices", []))
    first = result.samples[0]
    assert first.tokens_per_forward == first.tokens / sum(first.forwards.values())
    assert result.samples[-1].tokens_per_forward is None, "likelihoods write nothing"
    assert sum(s.tokens for s in result.samples) == result.rows[0].cost.tokens
    assert not result.healthy
    assert {gate.gate for gate in result.health if not gate.ok} >= {"length limit"}
    assert list(result.samples_frame()["key"]) == list(records)
    assert list(result.frame()["score"]) == [row.score for row in result.rows]


def test_notebooks_show_the_terminals_tables_escaped(tmp_path, capsys):
    result = fluid_eval.load_run(write_run(tmp_path / "run"))
    assert "FLUID <b>7B" in result.model
    page = result._repr_html_()
    assert "<b>" not in page
    assert "FLUID &lt;b&gt;7B" in page
    print_result(result.values, result.folder)
    printed = capsys.readouterr().out
    cells = [cell for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page) if cell]
    assert len(cells) > 20
    assert all(cell in printed for cell in cells)
    assert str(result) == repr(result)
    assert all(line.rstrip() in printed for line in str(result).splitlines()[1:8])


def test_runs_compare_and_are_audited_and_reported(result, settings, tmp_path):
    ar = fluid_eval.run(**settings, out=tmp_path / "ar", **{"decoder.name": "ar"})
    compared = fluid_eval.compare(ar, result.folder)
    frame = compared.frame()
    assert list(frame["task"]) == ["mini_gsm8k_1", "mini_mmlu_1", "all"]
    assert (frame["score_other"] - frame["score_base"] - frame["difference"]).abs().max() < 1e-12
    assert compared.worse(0) == []
    assert "McNemar" not in compared._repr_html_()
    assert "mini_mmlu_1" in compared._repr_html_()
    audited = fluid_eval.audit(result)
    assert (audited.lossless, audited.n, audited.identical) == (True, 6, 6)
    assert json.loads((result.folder / "audit.json").read_text())["verdict"] == audited.verdict
    assert audited._repr_html_().startswith("<pre>")
    assert f"verdict: {audited.verdict}" in str(audited)
    page = fluid_eval.report(ar, result, base=result, markdown=str(tmp_path / "page.md"))
    assert page == tmp_path / "ar" / "report.html"
    assert page.is_file()
    assert (tmp_path / "page.md").is_file()


def test_a_sweep_has_points_a_figure_and_runs(swept):
    done, events = swept
    assert fluid_eval.load_sweep(done.folder) == done
    assert [point.name for point in done.points] == ["verify", "no verify", "ar"]
    assert (done.baseline, done.by) == ("ar", "tokens_per_forward")
    ar = done.run("ar")
    assert (ar.decoder["name"], {row.task for row in ar.rows}) == ("ar", set(TASKS.split(",")))
    with pytest.raises(ConfigError, match="no point 'γ'; known: verify, no verify, ar"):
        done.run("γ")
    assert list(done.frame()["name"]) == [point.name for point in done.points]
    figure = done.figure()
    assert figure.axes[0].get_xlabel() == "tokens/forward"
    assert figure._repr_png_() == (done.folder / "frontier-tokens_per_forward.png").read_bytes()
    assert "no verify" in done._repr_html_()
    assert [event.done for event in events] == list(range(1, 37))
    assert {(event.title, event.total) for event in events} == {("sweep", 36)}
    assert {event.point for event in events} == {"verify", "no verify", "ar"}


def test_progress_reaches_the_caller_who_may_stop(settings, tmp_path, capsys):
    events: list[ProgressEvent] = []

    def stop_at_four(event: ProgressEvent) -> None:
        events.append(event)
        if event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fluid_eval.run(**settings, out=tmp_path / "run", progress=stop_at_four)
    assert events == [ProgressEvent("writing", done, 6) for done in range(5)]
    later: list[ProgressEvent] = []
    done = fluid_eval.run(**settings, out=tmp_path / "run", progress=later.append, resume=True)
    assert later == [ProgressEvent("writing", n, 6) for n in (4, 5, 6)] + [
        ProgressEvent("scoring", n, 6) for n in range(7)
    ]
    assert done.values["notices"][0].startswith("4 samples are from an earlier session")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tasks": "gsm9k"}, ["--tasks", "gsm9k"]),
        ({"limit": 0}, ["--limit", "0"]),
        ({"decoder.confidnce": 0.5}, ["--set", "decoder.confidnce=0.5"]),
        ({"decoder": "llada"}, ["--decoder", "llada"]),
        ({"profile": "none.toml"}, ["--profile", "none.toml"]),
    ],
)
def test_errors_are_the_commands_one_line(given, words, settings, tmp_path, capsys):
    values = {**settings, **given}
    with pytest.raises(ConfigError) as error:
        fluid_eval.run(**values, out=tmp_path / "run")
    flags = ["--tasks", TASKS, "--model", str(settings["model"]), "--max-new-tokens", "6", "--limit", "6", *words]
    assert main(["run", *flags, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"fluid-eval: {' '.join(str(error.value).split())}\n"
    assert not (tmp_path / "run").exists()


def test_folders_without_results_are_refused(swept, result, tmp_path):
    for folder, load, text in (
        (tmp_path, fluid_eval.load_run, "no run here"),
        (tmp_path, fluid_eval.load_sweep, "no sweep here"),
        (result.folder, fluid_eval.load_sweep, "no sweep here"),
        (swept[0].folder, fluid_eval.load_run, "no run here"),
    ):
        with pytest.raises(ConfigError, match=text):
            load(folder)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match="not finished"):
        fluid_eval.load_sweep(tmp_path)
    values = json.loads((swept[0].folder / RESULT).read_text())
    values["points"][0]["score"]["mean"] = "high"
    (tmp_path / RESULT).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"result\.json: no finished sweep \(points is"):
        fluid_eval.load_sweep(tmp_path)
    with pytest.raises(ConfigError, match="at least one run folder"):
        fluid_eval.report()
    with pytest.raises(ConfigError, match="a sweep needs settings to vary"):
        fluid_eval.sweep(tasks=TASKS, model="m")


@pytest.mark.slow
def test_the_quickstart_shows_what_its_cells_give(tmp_path):
    notebook = json.loads(notebooks.QUICKSTART.read_text())
    outputs = notebooks.run(notebook, tmp_path)
    for cell, new in zip(notebooks.code_cells(notebook), outputs, strict=True):
        old = cell["outputs"]
        assert [plain(output) for output in old] == [plain(output) for output in new], "python -m tests.notebooks"
        forms = [set(output.get("data", ())) for output in old]
        assert forms == [set(output.get("data", ())) for output in new]
    assert "image/png" in {
        form for cell in notebooks.code_cells(notebook) for o in cell["outputs"] for form in o.get("data", ())
    }


def plain(output: dict) -> str:
    """An output's text without speeds."""
    lines = output["text"] if "text" in output else output["data"]["text/plain"]
    return notebooks.without_speeds("".join(lines))


@pytest.mark.slow
def test_the_pages_examples_run(tmp_path, capsys):
    page = (notebooks.ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    with notebooks.as_in_docs(tmp_path):
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), names)
        assert Path("frontier.pdf").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "identical" in printed
    assert "writing 12 0" in printed
    assert "task 'gsm9k' is unknown" in printed
