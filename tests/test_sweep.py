"""A sweep: points in document batches, one frontier, whatever happened on the way."""

from __future__ import annotations

import json

import pandas
import pytest

import fluid_eval
from fluid_eval.cli import EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_eval.output.terminal import FORWARDS
from fluid_eval.results.run_folder import Run, read_samples
from fluid_eval.running.chunks import FailedRequest
from fluid_eval.running.job import run
from fluid_eval.running.workers import InlinePool
from fluid_eval.sweeps import frontier_figure, pareto
from fluid_eval.sweeps import sweep as module
from fluid_eval.sweeps.grid import plan
from fluid_eval.sweeps.sweep import Sweep
from fluid_model import ConfigError


def values_of(model):
    """With a slot budget, without which drafts follow the clock."""
    return {
        "tasks": ["mini_gsm8k_1", "mini_mmlu_1"], "model": str(model), "limit": 12, "max_new_tokens": 6,
        "decoder": {"name": "fluid", "slot_budget": 64},
        "sweep": {"grid": {"decoder.verify": [True, False]}, "point": [{"decoder.name": "ar"}]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tiny_fluid, tmp_path_factory):
    """A sweep that nothing happened to: its folder and result. No test changes it."""
    folder = tmp_path_factory.mktemp("sweeps") / "whole"
    return folder, Sweep(plan(values_of(tiny_fluid)), folder).work()


@pytest.fixture
def values(tiny_fluid, monkeypatch):
    """Sweeps of these values draw no figure, which takes longer than their answers."""
    monkeypatch.setattr(frontier_figure, "draw", lambda *_, **__: False)
    return values_of(tiny_fluid)


def without_clock(result) -> list:
    """What does not depend on the clock."""
    return [
        (p["name"], p["n"], p["score"], p["tokens_per_forward"], p["forwards_per_answer"]) for p in result["points"]
    ]


def test_a_sweep_is_its_runs_and_their_frontier(unbroken, values, tmp_path):
    sweep, result = unbroken
    assert [p["name"] for p in result["points"]] == ["verify", "no verify", "ar"]
    for point, planned in zip(result["points"], plan(values).points, strict=True):
        alone = run(planned.spec, tmp_path / planned.spec.id)
        records = {r["key"]: r for r in read_samples(sweep / point["folder"])}
        expected = {r["key"]: r for r in read_samples(tmp_path / planned.spec.id)}
        assert records.keys() == expected.keys()
        for key, record in records.items():
            assert record["output_ids"] == expected[key]["output_ids"], (point["name"], key)
            assert record["scores"] == expected[key]["scores"]
        assert point["n"] == len(records) == 24
        assert sum(line["n"] for line in alone["lines"]) >= 24
        assert fluid_eval.load_results(sweep / point["folder"]).shape[0] == point["n"]
    assert result["points"][0]["score"] == result["points"][2]["score"], "verified text is AR's"
    assert result["baseline"] == "ar"
    table = pandas.read_parquet(sweep / "frontier.parquet")
    assert table["name"].tolist() == ["verify", "no verify", "ar"]
    named = "frontier-tokens_per_second"
    assert (sweep / f"{named}.svg").stat().st_size > 1000
    text = (sweep / f"{named}.txt").read_text().strip()
    assert text == result["caption"]
    assert "3 points, n = 24 documents each" in text
    assert "float32" in text
    assert "tokens/s are of one run, without an interval" in text
    assert "max_horizon 16" in text, "what all points of a decoder share"
    assert "verify on" not in text, "what they do not share"
    assert (sweep / f"{named}.tex").read_text().startswith("\\begin{figure}")


def test_points_answer_in_document_batches(values, tmp_path, monkeypatch):
    """So that an early stop still compares."""
    monkeypatch.setattr(module, "LEAST_SAMPLES", 3)
    seen: list[tuple[str, int]] = []
    real = InlinePool.run

    def watch(self, chunks):
        seen.extend((chunk.point, len(chunk.work)) for chunk in chunks)
        return real(self, chunks)

    monkeypatch.setattr(InlinePool, "run", watch)
    result = Sweep(plan(values), tmp_path / "s").work()
    assert [name for name, _ in seen] == ["verify", "no verify", "ar"] * 8
    assert sum(count for _, count in seen) == sum(p["n"] for p in result["points"]) == 3 * 24


def break_off(values, folder, monkeypatch):
    """Interrupt a sweep at its 31st answer."""
    keep, stored = Run.append, []

    def interrupted(self, record):
        keep(self, record)
        stored.append(record["key"])
        if len(stored) == 31:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Sweep(plan(values), folder).work()
    monkeypatch.setattr(Run, "append", keep)


def test_a_broken_sweep_goes_on_and_ends_as_an_unbroken_one(unbroken, values, tmp_path, monkeypatch):
    break_off(values, tmp_path / "s", monkeypatch)
    assert not (tmp_path / "s" / "result.json").exists()
    with pytest.raises(ConfigError, match="holds this sweep; pass --resume"):
        Sweep(plan(values), tmp_path / "s")
    again = Sweep(plan(values), tmp_path / "s", resume=True)
    assert again.missing == 3 * 24 - 31
    result = again.work()
    assert without_clock(result) == without_clock(unbroken[1])
    assert result["answered_now"] == 3 * 24 - 31
    assert Sweep(plan(values), tmp_path / "s", resume=True).work() == result, "nothing is left to do"


def test_two_at_once_are_refused(values, tmp_path):
    first = Sweep(plan(values), tmp_path / "s")
    real = first._begin

    def second(pool, timed):
        with pytest.raises(ConfigError, match="another process writes here"):
            Sweep(plan(values), tmp_path / "s", resume=True).work()
        real(pool, timed)

    first._begin = second  # type: ignore[method-assign]
    first.work()


def test_other_folders_are_refused(unbroken, values, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no sweep"):
        Sweep(plan(values), tmp_path)
    values["limit"] = 11
    with pytest.raises(ConfigError, match="holds another sweep"):
        Sweep(plan(values), unbroken[0], resume=True)


def test_points_surely_beaten_are_ended(values, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_SAMPLES", 6)
    monkeypatch.setattr(pareto, "below", lambda a, b, **_: a.name == "no verify" and b.name == "ar")
    result = Sweep(plan(values), tmp_path / "s").work(stop_dominated=True)
    ended = {p["name"]: (p["stopped"], p["n"]) for p in result["points"]}
    assert ended == {"verify": (None, 24), "no verify": ("below ar after 25% of the documents", 6), "ar": (None, 24)}
    assert not (tmp_path / "s" / result["points"][1]["folder"] / "result.json").exists(), "it is not whole"
    assert Sweep(plan(values), tmp_path / "s", resume=True).work(stop_dominated=True) == result
    finished = Sweep(plan(values), tmp_path / "s", resume=True).work()
    assert [p["n"] for p in finished["points"]] == [24] * 3
    assert not any(p["stopped"] for p in finished["points"])


def test_the_command(tiny_fluid, tmp_path, capsys):
    words = ["sweep", "--tasks", "mini_gsm8k_1", "--model", str(tiny_fluid), "--decoder", "fluid", "--limit", "4"]
    words += [
        "--max-new-tokens",
        "4",
        "--set",
        "decoder.verify=false",
        "--sweep",
        "decoder.confidence=0.3,0.9",
        "--out",
        str(tmp_path / "s"),
    ]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 points, 8 samples to answer" in " ".join(out.split())
    assert not (tmp_path / "s").exists(), "nothing is written"
    assert main([*words, "--json"]) == EXIT_UNHEALTHY, "the best point's answers all hit the limit"
    assert len(json.loads(capsys.readouterr().out)["points"]) == 2
    assert main(words) == 2
    assert main([*words, "--resume"]) == EXIT_UNHEALTHY
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if "folder:" not in line)
    assert "γ=0.3" in out
    assert FORWARDS in out.splitlines()
    assert "!: a health gate is over its threshold" in out


def test_what_was_given_up_is_tried_again(values, tmp_path, monkeypatch):
    """A sample that one day's workers could not answer is no part of that day's scores, and answered the next."""
    values["decoder"] = {"name": "fluid", "slot_budget": 10_000}  # dear slots are fed by how many rows share a forward
    del values["sweep"]["point"]
    complete = Sweep(plan(values), tmp_path / "whole").work()
    real, bad = InlinePool.run, "mini_gsm8k_1/3"

    def lossy(self, chunks):
        for point, answer in real(self, chunks):
            yield point, FailedRequest(bad, "its worker died") if answer.key == bad else answer

    monkeypatch.setattr(InlinePool, "run", lossy)
    result = Sweep(plan(values), tmp_path / "s").work()
    assert result["lost"] == {f"{p['name']}: {bad}": "its worker died" for p in result["points"]}
    assert [p["n"] for p in result["points"]] == [23] * 2
    assert main(["report", str(tmp_path / "s" / result["points"][0]["folder"])]) == 0
    monkeypatch.setattr(InlinePool, "run", real)
    again = Sweep(plan(values), tmp_path / "s", resume=True)
    assert again.missing == 2
    assert without_clock(again.work()) == without_clock(complete)


def test_drawn_examples_are_those_of_a_run(tiny_fluid, few_rows, tmp_path):
    """Few-shot examples are drawn at random, and tasks are asked more than once."""
    values = {
        "tasks": "gsm8k", "model": str(tiny_fluid), "decoder": "fluid", "data_dir": str(few_rows), "limit": 3,
        "num_fewshot": 2, "max_new_tokens": 4, "sweep": {"grid": {"decoder.verify": [True, False]}},
    }  # fmt: skip
    planned = plan(values)
    result = Sweep(planned, tmp_path / "s").work()
    run(planned.points[0].spec, tmp_path / "r")
    expected = [record["prompt"] for record in read_samples(tmp_path / "r")]
    assert expected[0].count("Question:") == 3
    for point in result["points"]:
        assert [r["prompt"] for r in read_samples(tmp_path / "s" / point["folder"])] == expected


def test_what_is_answered_so_far_compares(unbroken, values, tmp_path, monkeypatch):
    """By the batches that all points have answered; nothing is answered for it, and no result is written."""
    monkeypatch.setattr(module, "LEAST_SAMPLES", 3)
    break_off(values, tmp_path / "s", monkeypatch)
    monkeypatch.setattr(InlinePool, "run", lambda *_: pytest.fail("nothing is to be answered"))
    job = Sweep(plan(values), tmp_path / "s", resume=True)
    result = job.so_far()
    assert [p["n"] for p in result["points"]] == [2 * -(-12 * round(8 * result["so_far"]) // 8)] * 3
    assert 0 < result["so_far"] < 31 / 72
    assert result["points"][0]["score"] == result["points"][2]["score"]
    assert job.missing == 3 * 24 - 31
    assert not (tmp_path / "s" / "result.json").exists()
    assert Sweep(plan(values), unbroken[0], resume=True).so_far()["points"] == unbroken[1]["points"]
    with pytest.raises(ConfigError, match="not all points have answered their first 12%"):
        Sweep(plan(values), tmp_path / "none").so_far()


def test_files_enough_are_open(monkeypatch):
    import resource

    from fluid_eval.sweeps.open_files import allow_open_files

    limits = {"now": (600, 5000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    allow_open_files(50)
    assert limits["now"] == (600, 5000)
    allow_open_files(1000)
    assert limits["now"] == (2500, 5000)
    with pytest.raises(ConfigError, match="3000 points needs 6500 open files, and 5000 are allowed"):
        allow_open_files(3000)
