"""Speeds: what they hold under is recorded, repeats taken in turns say how sure they are, and one run says nothing."""

from __future__ import annotations

import json
import math

import pytest

from fluid_eval.analysis.compare import compare
from fluid_eval.analysis.speed_ratios import TimedRun, speeds
from fluid_eval.cli import EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_eval.output.report.runs import read_runs
from fluid_eval.output.terminal import FORWARDS
from fluid_eval.results import run_folder, speed_conditions, speed_repeats
from fluid_eval.results.metrics import cost
from fluid_eval.running.job import run
from fluid_eval.sweeps import pareto
from fluid_eval.sweeps.grid import plan
from fluid_eval.sweeps.points import Point, ScoredDocument, as_point
from fluid_eval.sweeps.sweep import Sweep
from fluid_model.common.errors import ConfigError

from .test_compare import ENGINE, answers, write_run

FLUID = {"name": "fluid", "rounds": "one", "verify": True}


def drafted(scores, *, slot_budget=64, rows=32, **changes):
    return answers(scores, draft_policy={"slot_budget": slot_budget, "rows": rows}, **changes)


def pair_of(folders):
    return compare(folders)["pairs"][0]["speed"]


def test_a_resumed_run_feeds_what_an_unbroken_one_does(tmp_path):
    """Each slot's cost is reckoned for the rows of the whole run, not for those that are left."""
    values = {
        "tasks": "mini_gsm8k_1", "model": str(resource("checkpoints") / "tiny-fluid"), "limit": 6, "max_new_tokens": 16,
        "decoder": {"name": "fluid", "slot_budget": 40},
    }  # fmt: skip
    spec = build_spec(values)
    complete = run(spec, tmp_path / "whole")
    (broken := tmp_path / "broken").mkdir()
    for name in (run_folder.SPEC, run_folder.ENVIRONMENT):
        (broken / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    records = list(run_folder.read_samples(tmp_path / "whole"))
    (broken / run_folder.SAMPLES).write_bytes(b"".join(map(run_folder.encode, records[:4])))
    resumed = run(spec, broken, resume=True)
    again = list(run_folder.read_samples(broken))
    assert [r["trace"] for r in again] == [r["trace"] for r in records]
    assert {json.dumps(r["draft_policy"]) for r in again} == {json.dumps({"slot_budget": 40, "rows": 6})}
    assert (complete["conditions"]["rows"], complete["conditions"]["slot_budget"]) == ([6], [40])
    assert {**complete["conditions"], "sessions": 2} == resumed["conditions"]


@pytest.mark.parametrize(("task", "has_written"), [("mini_gsm8k_1", True), ("mini_mmlu_1", False)])
def test_conditions_of_tokens_a_forward_are_shown_where_text_was_written(tmp_path, capsys, task, has_written):
    assert main(["run", "--tasks", task, "--limit", "1", "--out", str(tmp_path / "run")]) in (0, EXIT_UNHEALTHY)
    assert ("tok/fwd at " in capsys.readouterr().out) == has_written


def test_what_forwards_hold_under_is_marked_where_it_differs(tmp_path, capsys):
    """Budget, rows, a run that changed under way, another forward; what was not recorded is not equal."""
    cases = {
        "slot budget: 64 / 7": {"slot_budget": 7},
        "rows a forward: 32 / 1": {"rows": 1},
        "slot budget: not recorded; rows a forward: not recorded": None,
    }
    made = {"decoder": FLUID, "spec": {"decoder": FLUID}}
    base = write_run(tmp_path / "base", drafted([1.0] * 12), **made)
    for place, (expected, changes) in enumerate(cases.items()):
        records = answers([1.0] * 12) if changes is None else drafted([1.0] * 12, **changes)
        other = write_run(tmp_path / str(place), records, **made)
        assert "; ".join(pair_of([base, other])["unequal"]) == expected
        assert pair_of([base, other])["tokens_per_forward"]["ratio"] == 1, "marked, not hidden"
        assert main(["compare", str(base), str(other)]) == 0
        printed = capsys.readouterr().out
        assert f"tok/fwd under unequal conditions: {expected}" in " ".join(printed.split())
        assert FORWARDS in printed.splitlines(), "prefill forwards count"
    assert pair_of([base, write_run(tmp_path / "same", drafted([1.0] * 12), **made)])["unequal"] == []
    mixed = write_run(tmp_path / "mixed", [*drafted([1.0] * 6), *drafted([1.0] * 12, rows=6)[6:]], **made)
    assert pair_of([base, mixed])["unequal"][-1] == "rows a forward changed while the other ran"
    ar = write_run(tmp_path / "ar", answers([1.0] * 12))
    assert pair_of([ar, base])["unequal"] == [], "AR's forwards depend on neither"
    assert pair_of([ar, base])["conditions"] == {"base": None, "other": "slot budget 64, rows a forward 32"}
    torch = write_run(tmp_path / "torch", drafted([1.0] * 12), engine={**ENGINE, "forward": "torch"}, **made)
    assert pair_of([ar, torch])["unequal"] == ["forward: compiled / torch"]
    llada = {"drafts_by_cost": False, "forward": None, "slot_budget": None, "rows": None}
    assert speed_conditions.unequal_forwards(llada, llada) == []


def test_drafts_that_follow_measured_time_are_equal_to_none(tmp_path):
    """What a run's rates decided is said beside its tokens/forward."""
    made = {"decoder": FLUID, "spec": {"decoder": FLUID}}
    rates = {"drafts": False, "drafting_rate": 100.0, "plain_rate": 200.0}
    records = answers([1.0] * 12, draft_policy={"slot_budget": None, "rows": 32, **rates})
    for record in records:
        record["trace"]["forwards"] = {"prefill": 1, "round": 1, "commit": 3}
    by_time = [write_run(tmp_path / name, records, **made) for name in ("base", "again")]
    fixed = write_run(tmp_path / "fixed", drafted([1.0] * 12), **made)
    for other in (by_time[1], fixed):
        assert pair_of([by_time[0], other])["unequal"] == [
            "drafts follow measured time unless decoder.slot_budget is set"
        ]
    shown = "measured time (75% of steps without drafts), rows a forward 32"
    assert pair_of(by_time)["conditions"] == {"base": shown, "other": shown}


def timed(folder, records, paces, *, session="s"):
    """Repeats of a run in which every answer took so long."""
    write_run(folder, records)
    for turn, pace in enumerate(paces):
        speed_repeats.append(folder, speed_repeats.Repeat(session, turn, {r["key"]: pace for r in records}))
    return folder


def test_only_repeats_in_turns_say_how_sure_a_ratio_is(tmp_path, capsys):
    """The machine is three times as slow in the second turn, for both: the ratio holds."""
    records = answers([1.0] * 12)
    base = timed(tmp_path / "base", records, [1.0, 3.0, 1.1])
    other = timed(tmp_path / "other", records, [0.5, 1.5, 0.5])
    second = pair_of([base, other])["tokens_per_second"]
    logs = [math.log(x) for x in (2.0, 2.0, 2.2)]
    assert (second["ratio"], second["repeats"]) == (pytest.approx(math.exp(sum(logs) / 3)), 3)
    assert 1.7 < second["low"] < 2 < second["high"] < 2.5
    assert pair_of([base, other])["cautions"] == []
    apart = timed(tmp_path / "apart", records, [0.5, 1.5, 0.5], session="another")
    pair = pair_of([base, apart])
    assert (pair["tokens_per_second"]["low"], pair["tokens_per_second"]["interleaved"]) == (None, False)
    assert [text.split(":")[0] for text in pair["cautions"]] == ["not interleaved", "one run each, no interval"]
    assert main(["compare", str(base), str(apart)]) == 0
    assert "tok/s: not interleaved: the machine's drift" in " ".join(capsys.readouterr().out.split())


def test_one_run_beats_no_point_in_seconds():
    """Equal work, timed once: ten times as fast by the clock is not surely faster. In turns it is."""
    samples = [ScoredDocument("t", doc, 1.0, 10, 10, 1.0) for doc in range(40)]
    fast = [ScoredDocument("t", doc, 1.0, 10, 10, 0.1) for doc in range(40)]
    once = pareto.measure([Point("a", {}, samples), Point("b", {}, fast)])
    assert [p.dominated_by for p in once] == [None, None]
    assert [p.tokens_per_second.bounded for p in once] == [False, False]
    slow, quick = ({("s", turn): pace * by for turn, by in enumerate((1.0, 0.3, 1.1))} for pace in (10.0, 100.0))
    turns = [Point("a", {}, samples, paces=slow), Point("b", {}, fast, paces=quick)]
    assert [p.dominated_by for p in pareto.measure(turns)] == ["b", None]
    assert pareto.measure(turns)[0].tokens_per_second.high > 20, "alone the machine's spread is all in it"


@pytest.mark.slow
def test_a_sweep_is_timed_in_turns(tiny_fluid, tmp_path, capsys):
    """Afterwards too; samples are stored once, and a report holds all against the AR point, whatever its id."""
    values = {
        "tasks": ["mini_gsm8k_1"], "model": str(tiny_fluid), "decoder": "fluid", "limit": 3, "max_new_tokens": 4,
        "sweep": {"point": [{"decoder.verify": True}, {"decoder.name": "ar"}, {"decoder.verify": False}]},
    }  # fmt: skip
    first = Sweep(plan(values), tmp_path / "s").work()
    assert [p["repeats"] for p in first["points"]] == [0] * 3
    assert first["points"][0]["tokens_per_second"]["low"] is None
    result = Sweep(plan(values), tmp_path / "s", resume=True).work(speed_repeats=2)
    folders = [tmp_path / "s" / p["folder"] for p in result["points"]]
    repeats = [speed_repeats.read(folder) for folder in folders]
    assert len({tuple((r.session, r.turn) for r in each) for each in repeats}) == 1, "the same turns"
    assert [len(each) for each in repeats] == [2] * 3
    assert not any(r.unequal for each in repeats for r in each)
    assert result["answered_now"] == 0
    for point in result["points"]:
        speed = point["tokens_per_second"]
        assert (point["repeats"], point["n"]) == (2, 3)
        assert speed["low"] <= speed["mean"] <= speed["high"]
    assert Sweep(plan(values), tmp_path / "s", resume=True).work(speed_repeats=2) == result, "timed already"
    line = json.loads((folders[1] / "result.json").read_text())["lines"][0]
    assert (line["speed_repeats"], line["tokens_per_second_low"] > 0) == (2, True)
    runs, why = read_runs([tmp_path / "s"])
    assert [run.folder for run in runs] == [folders[1], folders[0], folders[2]], "not the first, and not the last"
    assert why == "the sweep's first AR point"
    assert read_runs([tmp_path / "s"], folders[2])[0][0].folder == folders[2]
    with pytest.raises(ConfigError, match="is none of the runs"):
        read_runs([tmp_path / "s"], tmp_path / "elsewhere")
    pairs = compare(folders, all_pairs=True)["pairs"]
    assert [pair["speed"]["tokens_per_second"]["repeats"] for pair in pairs] == [2] * 3


def test_repeats_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="speed_repeats=1 must be at least 2"):
        speed_repeats.check_count(1)
    speed_repeats.append(tmp_path, speed_repeats.Repeat("s", 0, {"t/0": 1.0}))
    file = tmp_path / speed_repeats.REPEATS
    with file.open("ab") as torn:
        torn.write(b'{"session": "s", "tu')
    assert len(speed_repeats.read(tmp_path)) == 1, "what a crash left is no repeat"
    speed_repeats.append(tmp_path, speed_repeats.Repeat("s", 1, {"t/0": 2.0}, ["t/0"]))
    assert [r.turn for r in speed_repeats.read(tmp_path)] == [0, 1]
    assert speed_repeats.notices(speed_repeats.read(tmp_path))[0].startswith(
        "speed repeats: 1 answers were not written"
    )
    file.write_bytes(file.read_bytes() + b"{}\n")
    with pytest.raises(ConfigError, match=r"repeats.jsonl, line 3: not a repeat"):
        speed_repeats.read(tmp_path)


def test_a_group_of_written_and_scored_documents_has_one_speed_everywhere():
    """A forward that scores a choice writes no token: it counts in no speed, whatever group it is asked in."""
    written = answers([1.0, 0.0] * 10)
    scored = [
        record | {"key": f"choices/{n}", "task": "choices", "output_ids": [], "finish": None}
        for n, record in enumerate(written)
    ]
    together, apart = [*written, *scored], cost(written)
    owners = dict.fromkeys({record["task"] for record in together}, "all")
    (placed,) = pareto.measure([as_point("p", {}, together, owners)], draws=10)
    assert placed.tokens_per_forward.mean == pytest.approx(apart.tokens_per_forward)
    assert placed.tokens_per_second.mean == pytest.approx(apart.tokens_per_second)
    assert placed.n == 40
    run = TimedRun({}, {}, {}, [], [together])
    assert speeds(run, run)["tokens_per_forward"]["base"] == pytest.approx(apart.tokens_per_forward)
    again = [speed_repeats.Repeat("s", turn, {record["key"]: 0.5 for record in written}) for turn in range(2)]
    paces = as_point("p", {}, together, owners, repeats=again).paces
    assert list(paces.values()) == pytest.approx([apart.tokens / (0.5 * len(written))] * 2), (
        "what was timed is all there is"
    )
