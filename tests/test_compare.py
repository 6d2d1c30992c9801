"""Runs compared: pairs are pairs, what differs is told, and a regression is an exit code."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluid_eval.analysis.compare import compare, significant, worse
from fluid_eval.cli import EXIT_CONFIG, EXIT_OK, EXIT_WORSE
from fluid_eval.cli.main import main
from fluid_eval.common.stats import difference_over_tasks, mcnemar, minimum_detectable
from fluid_eval.output.report import facts
from fluid_eval.results.run_folder import encode, write_json
from fluid_model.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
ENGINE = {"device": "cpu", "dtype": "float32", "threads": 1, "workers": 1, "forward": "compiled"}


def record(task, doc, score, *, tokens=10, forwards=10, seconds=1.0, **changes):
    """A sample as a run stores it; without tokens, of a task that writes nothing."""
    return {
        "key": f"{task}/{doc}", "task": task, "doc_id": doc, "prompt": "p", "prompt_hash": f"{task}{doc}",
        "target": f"t{doc}", "output": "o", "output_ids": [1] * tokens, "finish": "eos" if tokens else None,
        "trace": {"forwards": {"round": forwards}, "slots": 1, "predicted": [], "accepted": []}, "seconds": seconds,
        "truncated": 0, "extracted": {"none": "o"}, "scores": {"acc,none": score, "other,none": 0.0}, **changes,
    }  # fmt: skip


def write_run(folder, records, *, engine=ENGINE, **result):
    """A finished run folder of one task a leaf."""
    folder.mkdir()
    spec = {"num_fewshot": None, "batch_size": "auto", **result.pop("spec", {})}
    tasks = dict.fromkeys(r["task"] for r in records)
    write_json(folder / "spec.json", spec)
    write_json(folder / "environment.json", {"engine": engine, "processor": "x", "cpus": 2})
    lines = [{"task": t, "n": sum(r["task"] == t for r in records)} for t in tasks]
    values = {"model": "m", "decoder": {"name": "ar"}, "members": {t: [t] for t in tasks}, "lines": lines, **result}
    write_json(folder / "result.json", {"task_versions": dict.fromkeys(tasks, 1), **values})
    (folder / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    return folder


def answers(scores, task="t", **changes):
    return [record(task, doc, score, **changes) for doc, score in enumerate(scores)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and a run that lost 30 of 100 answers of `t` and gained 4, on `u` the same, twice as fast."""
    root = tmp_path_factory.mktemp("runs")
    base = [*answers([1.0] * 90 + [0.0] * 10), *answers([1.0, 0.0] * 20, "u", tokens=0)]
    scores = [0.0] * 30 + [1.0] * 64 + [0.0] * 6
    other = [*answers(scores, forwards=5, seconds=0.5), *answers([1.0, 0.0] * 20, "u", tokens=0)]
    return write_run(root / "base", base), write_run(root / "other", other)


def test_pairs_by_hand(runs):
    (pair,) = compare(runs)["pairs"]
    t, u = pair["tasks"]
    assert (t["task"], t["metric"], t["n"], t["b"], t["c"]) == ("t", "acc,none", 100, 30, 4)
    assert [t[name]["mean"] for name in ("base", "other", "difference")] == pytest.approx([0.9, 0.64, -0.26])
    assert (t["difference"]["low"], t["difference"]["high"]) == pytest.approx((-0.360, -0.150), abs=0.001)
    assert t["mcnemar_p"] < 1e-4
    assert t["flips"]["gained"] == [f"t/{doc}" for doc in range(90, 94)]
    assert t["flips"]["lost"] == [f"t/{doc}" for doc in range(30)]
    assert (u["difference"]["mean"], u["mcnemar_p"], u["b"], u["c"]) == (0, 1.0, 0, 0)
    assert u["difference"]["low"] < 0 < u["difference"]["high"], "no flip in 40 is not none ever"
    assert t["mde"] == pytest.approx(minimum_detectable(100, 0.34))
    assert u["mde"] == pytest.approx(minimum_detectable(40, 0.0)), "no flip seen is not none there"
    variance = 0.34 / 100 / 2**2  # of the mean over two tasks, one of which never flips
    even = 2**2 / (1 / 100 + 1 / 40)  # documents of one task of which as much is known as of the mean of both
    assert pair["all"]["mde"] == pytest.approx(minimum_detectable(even, even * variance))
    assert pair["all"]["difference"]["mean"] == pytest.approx(-0.13), "the mean over tasks, not over documents"
    assert pair["all"]["flips"] == t["flips"]
    assert [pair["speed"]["tokens_per_forward"][x] for x in ("low", "ratio", "high")] == pytest.approx([2, 2, 2])
    second = pair["speed"]["tokens_per_second"]
    assert [second[x] for x in ("low", "ratio", "high")] == [None, 2, None], "one run each says nothing of the machine"
    assert all(u["speed"][name] is None for name in ("tokens_per_second", "tokens_per_forward"))


def test_turned_round_everything_turns(runs):
    (there,), (back,) = compare(runs)["pairs"], compare(runs[::-1])["pairs"]
    for a, b in zip([*there["tasks"], there["all"]], [*back["tasks"], back["all"]], strict=True):
        assert a["difference"]["mean"] == pytest.approx(-b["difference"]["mean"])
        assert a["difference"]["low"] == pytest.approx(-b["difference"]["high"])
        assert (a["flips"]["gained"], a["b"], a["base"]) == (b["flips"]["lost"], b["c"], b["other"])
        assert (a["mde"], a["mcnemar_p"]) == pytest.approx((b["mde"], b["mcnemar_p"]))
    assert back["speed"]["tokens_per_second"]["ratio"] == pytest.approx(0.5)


def test_only_answers_to_the_same_prompt_are_pairs(tmp_path):
    base = write_run(tmp_path / "a", answers([1.0] * 6))
    records = answers([1.0, 0.0, 0.0, 1.0])
    records[1] |= {"prompt_hash": "another"}
    records[2] |= {"lost": "its worker died"}
    other = write_run(tmp_path / "b", [*records, *answers([1.0], "elsewhere")])
    (pair,) = compare([base, other])["pairs"]
    assert (pair["tasks"][0]["n"], pair["tasks"][0]["other"]["mean"]) == (2, 1.0)
    assert pair["unpaired"] == {
        "only the base has": ["t/2", "t/4", "t/5"], "only the other has": ["elsewhere/0"], "another prompt": ["t/1"],
    }  # fmt: skip
    elsewhere = write_run(tmp_path / "c", answers([1.0], "elsewhere"))
    with pytest.raises(ConfigError, match="share no document: 6 only the base has, 1 only the other has"):
        compare([base, elsewhere])


def protocol(**changes):
    values = {"num_fewshot": 5, "until": ["Question:"], "source": "somewhere", **changes}
    return {"protocol": {"name": "n", "hash": repr(values), "tasks": {"t": values}}}


def test_other_protocols_are_refused_unless_asked(tmp_path, capsys):
    """By what the protocols hold of the tasks both have; of older runs by the spec and task versions."""
    base = write_run(tmp_path / "a", answers([1.0] * 30), **protocol())
    moved = [{**r, "prompt_hash": "0-shot"} for r in answers([0.0] * 29 + [1.0], target="t0")]
    moved[:30] = [{**r, "target": f"t{r['doc_id']}"} for r in moved]
    other = write_run(tmp_path / "b", moved, **protocol(num_fewshot=0, until="\n", source="elsewhere"))
    assert main(["compare", str(base), str(other)]) == EXIT_CONFIG
    err = capsys.readouterr().err
    assert "follow different protocols (t num_fewshot: 5 / 0; and 1 more)" in err
    assert main(["compare", str(base), str(other), "--across-protocols"]) == EXIT_OK
    out = capsys.readouterr().out
    assert "  t num_fewshot: 5 / 0\n  t until: ['Question:'] / \\n\n" in out
    result = compare([base, other], across_protocols=True)
    assert (result["pairs"][0]["all"]["n"], len(result["protocol_difference"])) == (30, 2)
    steps = '[{"function": "regex", "regex_pattern": "#### (x)"}, {"function": "take_first"}]'
    regex_run = write_run(
        tmp_path / "read", answers([1.0]), **protocol(extractors={"strict": steps, "none": "as written"})
    )
    boxed = write_run(tmp_path / "boxed", answers([1.0]), **protocol(extractors={"strict": "boxed"}))
    assert compare([regex_run, boxed], across_protocols=True)["protocol_difference"] == [
        "t extractors strict: regex (regex_pattern #### (x)), take_first / boxed",
        "t extractors none: as written / none",
    ]
    alike = write_run(tmp_path / "c", answers([1.0] * 30), **protocol(source="elsewhere"))
    assert compare([base, alike])["protocol_difference"] == [], "where it is from is not what it is"
    old = write_run(tmp_path / "d", answers([1.0] * 30), spec={"num_fewshot": 3}, task_versions={"t": 2, "u": 1})
    with pytest.raises(ConfigError, match=r"num_fewshot: none / 3; and 1 more"):
        compare([write_run(tmp_path / "e", answers([1.0] * 30)), old])


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({**ENGINE, "threads": 2}, "threads: 1 / 2"),
        ({**ENGINE, "dtype": "bfloat16"}, "dtype: float32 / bfloat16"),
        ({**ENGINE, "forward": "torch"}, "forward: compiled / torch"),
        ({**ENGINE, "forward": "torch", "forward_kind": "explicit"}, "forward: compiled / torch"),
        ({"device": "cpu"}, "dtype, threads, workers, forward: not recorded"),
    ],
)
def test_seconds_of_other_machines_are_no_speeds(tmp_path, capsys, other, reason):
    runs = [write_run(tmp_path / n, answers([1.0] * 20), engine=e) for n, e in (("a", ENGINE), ("b", other))]
    speed = compare(runs)["pairs"][0]["speed"]
    assert (speed["tokens_per_second"], speed["not_compared"]) == (None, [reason])
    assert speed["tokens_per_forward"]["ratio"] == 1
    assert main(["compare", *map(str, runs)]) == EXIT_OK
    assert f"tok/s do not compare: {reason}" in capsys.readouterr().out


def test_forward_kinds_compare_where_both_are_recorded(tmp_path):
    """Runs recorded before there were kinds are not held to be unequal."""
    torch = {**ENGINE, "forward": "torch"}
    engines = {"old": torch, "explicit": {**torch, "forward_kind": "explicit"}}
    engines |= {"same": engines["explicit"], "captured": {**torch, "forward_kind": "captured"}}
    runs = {name: write_run(tmp_path / name, answers([1.0] * 20), engine=engine) for name, engine in engines.items()}
    for name, reasons in (("old", []), ("same", []), ("captured", ["forward_kind: explicit / captured"])):
        speed = compare([runs["explicit"], runs[name]])["pairs"][0]["speed"]
        assert speed["not_compared"] == reasons


def test_worse_means_surely_and_by_more(tmp_path, runs, capsys):
    words = ["compare", *map(str, runs), "--fail-if-worse"]
    assert main([*words, "1"]) == EXIT_WORSE
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["worse by more than 1: t", "worse by more than 1: all"]
    assert main([*words, "20"]) == EXIT_WORSE
    assert "all" not in capsys.readouterr().err, "13 points are not more than 20"
    assert main([*words, "26.5"]) == EXIT_OK
    assert main(["compare", *map(str, runs[::-1]), "--fail-if-worse", "0"]) == EXIT_OK, "better is not worse"
    assert main([*words, "-1"]) == EXIT_CONFIG
    chance = [
        write_run(tmp_path / "a", answers([1.0] * 15)),
        write_run(tmp_path / "b", answers([0.0] * 4 + [1.0] * 11)),
    ]
    assert worse(compare(chance), 1.0) == [], "4 of 15, p = 0.125"


def pair_of(flips, n=210):
    """A pair of runs with so many (lost, gained) answers of n in each task, as `compare` gives it."""
    tasks = [([1.0] * b + [0.0] * c + [1.0] * (n - b - c), [0.0] * b + [1.0] * (n - b)) for b, c in flips]

    def entry(name, tasks, flips):
        result = difference_over_tasks(*zip(*tasks, strict=True))
        difference = {"mean": result.mean, "low": result.low, "high": result.high}
        return {"task": name, "difference": difference, "mcnemar_p": mcnemar(*map(sum, zip(*flips, strict=True)))}

    each = [entry(f"t{i}", [task], [flip]) for i, (task, flip) in enumerate(zip(tasks, flips, strict=True))]
    return {"other": "o", "tasks": each, "all": entry("all", tasks, flips)}


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "share"), [(1, 0.03), (4, 0.03), (4, 0.1), (20, 0.03)])
def test_equal_runs_are_seldom_called_worse(tasks, share):
    """`--fail-if-worse 0` where there is no true difference: at most 5% of builds fail, however many the tasks."""
    flips = np.random.default_rng(5).multinomial(
        210, [share / 2, share / 2, 1 - share], size=(min(200, 800 // tasks), tasks)
    )[:, :, :2]
    failed = sum(bool(worse({"pairs": [pair_of([(int(b), int(c)) for b, c in one])]}, 0)) for one in flips)
    print(f"{tasks} tasks, {share:.0%} flipped: {failed / len(flips):.1%} false alarms")
    assert failed / len(flips) <= 0.05


def test_one_task_of_many_must_stand_out_more():
    """7 lost of 210 are sure alone (p = 0.016), not as the worst of twenty tasks."""
    assert [entry["task"] for entry in significant(pair_of([(7, 0)]))] == ["t0"]
    assert significant(pair_of([(7, 0), *[(2, 3)] * 19])) == []
    assert [entry["task"] for entry in significant(pair_of([(12, 0), *[(2, 2)] * 3]))] == ["t0", "all"]
    assert [entry["task"] for entry in significant(pair_of([(5, 0), (5, 0)]))] == ["all"], "5 to one side: p = 0.06"
    assert [entry["task"] for entry in significant(pair_of([(8, 0), (9, 0), (0, 17)]))] == ["t0", "t1", "t2"]


def test_the_report_calls_sure_what_compare_does():
    verdicts = []
    for flips in ([(4, 0)], [(8, 0)], [(0, 8), (1, 1)], [(5, 0), (0, 5)], [(5, 0), (5, 0)]):
        pair = {"base": "b", "speed": None, **pair_of(flips, 60)}
        pair["all"]["mde"] = 0.05
        (verdict,) = facts._of_comparison({"pairs": [pair]}, {"b": "A", "o": "B"})
        verdicts.append((verdict.state, verdict.word, "detectable with 80% power: 5.0" in verdict.text))
    unsure = ("none", "no difference shown", True)
    assert verdicts == [unsure, ("bad", "worse", False), ("good", "better", False), unsure, ("bad", "worse", False)]


def test_a_drop_of_just_as_much_as_allowed_passes(tmp_path):
    """Of 100, 7 more wrong is -7.000000000000001 points."""
    for wrong, bar, passes in ((7, 7.0, True), (7, 6.9, False), (29, 29.0, True), (57, 57.0, True)):
        pair = pair_of([(wrong, 0)], 100)
        assert (worse({"pairs": [pair]}, bar) == []) is passes


def test_what_is_printed(tmp_path, runs, capsys):
    third = shutil.copytree(runs[0], tmp_path / "third")
    assert main(["compare", str(runs[0]), str(runs[1]), str(third)]) == EXIT_OK
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("base:", "other:")))
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert any(row.startswith("t 90.0 64.0 -26.0 [") for row in rows)
    assert any(row.startswith("u 50.0 50.0 +0.0 [-6.6, 6.6] 1.000") for row in rows)
    assert "right only in base: 30 (t/0, t/1, t/2, …)" in out
    assert out.count("other: ") == 3, "one a pair, and one in the words below"
    assert main(["compare", *map(str, runs), "--flips", "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(compare(runs)))
    main(["compare", *map(str, runs), "--flips"])
    assert "t/29)" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_compared_is_one_line(tmp_path, runs, capsys):
    (empty := tmp_path / "empty").mkdir()
    (unfinished := tmp_path / "unfinished").mkdir()
    (unfinished / "spec.json").write_text("{}")
    part = shutil.copytree(runs[1], tmp_path / "part")
    (part / "samples.jsonl").write_bytes(b"".join(map(encode, answers([1.0] * 100))))
    nan = write_run(tmp_path / "nan", answers([1.0, math.nan]))
    for words, message in (
        ([runs[0]], "needs at least two run folders"),
        ([runs[0], empty], "empty: no run here (no spec.json)"),
        ([runs[0], unfinished], "unfinished: this run is not finished (no result.json)"),
        ([runs[0], part], "0 samples of u, the result has 40"),
        ([runs[0], nan], "t/1 has the score acc,none=nan"),
        ([*runs, runs[0].parent / "." / "base"], "is named twice; name each run once"),
    ):
        assert main(["compare", *map(str, words)]) == EXIT_CONFIG
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_what_an_older_run_does_not_tell_is_what_was_done_then(tmp_path):
    """Its spec has no `profile`; the new one's is the default, which is the same."""
    old = write_run(tmp_path / "old", answers([1.0] * 30))
    new = {"profile": "lm-eval", "extractor": None, "chat": None, "max_new_tokens": None}
    assert compare([old, write_run(tmp_path / "new", answers([1.0] * 30), spec=new)])["protocol_difference"] == []
    with pytest.raises(ConfigError, match="profile: lm-eval / minimal"):
        compare([old, write_run(tmp_path / "other", answers([1.0] * 30), spec={**new, "profile": "minimal"})])


def test_any_scores_give_intervals_that_hold_their_means(tmp_path):
    rng = random.Random(0)
    scores = [[rng.choice([0.0, 0.25, 1.0]) for _ in range(40)] for _ in range(2)]
    runs = [write_run(tmp_path / str(i), answers(each)) for i, each in enumerate(scores)]
    entry = compare(runs)["pairs"][0]["tasks"][0]
    assert entry["mcnemar_p"] is None, "quarters are no right or wrong"
    for name in ("base", "other", "difference"):
        assert entry[name]["low"] <= entry[name]["mean"] <= entry[name]["high"]


def test_comparing_needs_no_torch(runs):
    program = "import sys; from fluid_eval.cli.main import main; main(sys.argv[1:])\n"
    program += "assert not {'torch', 'lm_eval', 'transformers', 'pandas'} & set(sys.modules)"
    words = [sys.executable, "-c", program, "compare", *map(str, runs)]
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
