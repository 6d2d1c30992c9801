"""The ledger's claims: checked one by one, measured or honestly not, judged."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.family import SYSTEMS
from fluid_eval import reproduce, verdicts
from fluid_eval.claims import Claim, System, read_claims
from fluid_eval.cli import main
from fluid_eval.paths import resource
from fluid_eval.reproduce import Place, judge
from fluid_eval.sandbox.ladder import Found
from fluid_eval.spec import build_spec
from fluid_eval.stats import Interval, interval
from fluid_model import ConfigError

LEDGER = """
source = [{ name = "here", cite = "measured" }]
system = [
  { name = "tiny", weights = "tiny-ar", device = "cpu" },
  { name = "seven", weights = "seven-7b", run = { decoder = "fluid" } },
]
claim = [
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "exact_match,strict-match", value = 100.0, source = "here", profile = "lm-eval", run = { limit = 3 } },
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "exact_match,flexible-extract", value = 0.0, source = "here", run = { limit = 3 } },
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "tokens_per_forward", unit = "tok/forward", value = 0.96, to = 0.98, source = "here", run = { limit = 3 } },
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "exact_match,strict-match", value = 100.0, source = "here", convention = "another", run = { limit = 3 } },
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "f1", value = 3.0, source = "here", run = { limit = 3 } },
  { table = "main", system = "seven", task = "gsm8k", metric = "exact_match,flexible-extract", value = 91.9, source = "here" },
  { table = "main", system = "seven", task = "mbpp", metric = "pass@1", value = 50.0, source = "here" },
  { table = "speed", system = "seven", task = "gsm8k", metric = "speed-up", unit = "times", value = 2.3, source = "here" },
]
"""  # noqa: E501


def claim(system="s", task="gsm8k", value=50.0, source="paper", **more):
    return Claim(**{"table": "main", "metric": "m", **more}, system=system, task=task, value=value, source=source)


def test_every_bundled_claim_is_whole_and_can_be_asked_for():
    """Settings that no run takes, or that a later version would not know, are found here and not after hours."""
    found = read_claims()
    assert len(found.claims) >= 90
    assert {c.table for c in found.claims} == {"tiny", "main", "ablation", "speed", "own"}
    for one in found.claims:
        settings = {**found.systems[one.system].run, **one.run}
        if settings.get("decoder") in (None, "ar", "fluid", "nbdiff", "llada") or isinstance(settings["decoder"], dict):
            build_spec({"tasks": [one.task], "model": "m", "profile": one.profile or "lm-eval", **settings})


def test_the_ledger_claims_of_the_tiny_family_what_its_page_says():
    """The family's scores are published by a program: the ledger's copy is the same to the decimal."""
    held = json.loads((resource("checkpoints") / "family.json").read_text())
    page = (resource("checkpoints").parent / "docs" / "tiny-family.md").read_text()
    found = read_claims()
    ours = [c for c in found.claims if c.source == "tiny family"]
    assert len(ours) == 6 * 5
    for one in ours:
        system = found.systems[one.system]
        wanted = system.weights, system.run.get("decoder", {"name": "ar"})
        (label,) = [s.label for s in SYSTEMS if (s.checkpoint, s.decoder) == wanted]
        if one.unit == "%":
            assert one.value == round(100 * held[label][one.task][0], 1), one.cell
        else:
            row = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
            assert f"{one.value:.2f}" == row.split("|")[7].strip(), one.cell


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 91.9", "value = 191.9", r"mine\.toml, claim 6 \(seven gsm8k\): value=191.9 must lie in"),
        ("value = 91.9", 'value = "many"', r"claim 6 \(seven gsm8k\): value='many' must be a number"),
        ("value = 91.9, ", "", r"claim 6 \(seven gsm8k\): value is missing"),
        ("value = 91.9", "value = 91.9, shots = 5", "claim 6 .*: shots is no setting; known: table, system"),
        ('table = "speed"', 'table = "x"', r"claim 8 \(seven gsm8k\): table='x' is unknown; known: tiny, main"),
        ('system = "seven", task = "mbpp"', 'system = "eight", task = "mbpp"', "claim 7 .*: system='eight' is not in"),
        ('value = 50.0, source = "here"', 'value = 50.0, source = "there"', "claim 7 .*: source='there' is not in"),
        ('task = "mbpp", metric = "pass@1"', 'task = "gsm8k", metric = "exact_match,flexible-extract"', "stands twice"),
        ('metric = "speed-up"', 'metric = "tempo"', "claim 8 .*: metric='tempo': unit times is of speed-up"),
        ("to = 0.98", "to = 0.5", "claim 3 .*: to=0.5 must lie in"),
        ('convention = "another"', 'convention = "another", profile = "lm-eval"', "claim 4 .*: convention='another'"),
        ('name = "seven"', 'name = "seven", parent = "nine"', "system seven: parent='nine' is not in the ledger"),
        ('name = "tiny"', 'name = "tiny, small"', "system 1 .*must hold no comma"),
        ('name = "seven"', 'name = "tiny"', r"system 2 \(tiny\): stands twice"),
        ("claim = [", "claims = [", "claims is no table of a claim ledger"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_named_with_its_file(tmp_path, old, new, message):
    file = tmp_path / "mine.toml"
    assert old in LEDGER
    file.write_text(LEDGER.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        read_claims(file)


def test_a_claim_changed_by_ten_points_flips_its_verdict():
    """At the sizes of the benchmarks: what lies in the middle is reproduced, ten points off it is not."""
    for n, share in itertools.product((210, 500, 1319), (0.3, 0.62, 0.9)):
        found = interval([1.0] * round(n * share) + [0.0] * (n - round(n * share)))
        one = claim(value=100 * found.mean, profile="lm-eval")
        assert judge(one, found, "lm-eval") == "reproduced"
        for points in (-10, 10):
            other = replace(one, value=min(100.0, one.value + points))
            assert judge(other, found, "lm-eval") == "not reproduced", (n, share, points)


def test_only_what_was_measured_as_stated_is_judged():
    found = Interval(0.5, 0.45, 0.55, 400)
    assert judge(claim(profile="lm-eval"), found, "lm-eval") == "reproduced"
    assert judge(claim(), found, "lm-eval") == "reproduced (convention not stated)"
    assert judge(claim(value=99.0), found, "lm-eval") == "not reproduced (convention not stated)"
    for other in (claim(profile="fluid-paper"), claim(convention="0-shot"), claim(value=99.0, convention="0-shot")):
        assert judge(other, found, "lm-eval") == "different convention"
    exact = Interval(0.9731, 0.9727, 0.9735, 630)
    speed = claim(unit="tok/forward", metric="tokens_per_forward", profile="lm-eval")
    rounded = [judge(replace(speed, value=value), exact, "lm-eval") for value in (0.97, 0.973, 0.97001, 0.98)]
    assert rounded == ["reproduced", "reproduced", "not reproduced", "not reproduced"], "0.97 may be 0.9731, 0.98 not"
    ratio = Interval(5.0, 4.8, 5.2, 9)
    ends = [(4.0, 4.7), (4.0, 4.9), (4.9, 5.0), (5.1, 6.0), (5.3, 6.0)]
    told = [judge(replace(speed, value=v, to=to), ratio, "lm-eval") for v, to in ends]
    assert told == ["not reproduced", "reproduced", "reproduced", "reproduced", "not reproduced"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The little ledger above, measured by the command."""
    out = tmp_path_factory.mktemp("claims")
    (out / "mine.toml").write_text(LEDGER)
    words = ["reproduce", "--ledger", str(out / "mine.toml"), "--models-dir", str(out), "--data-dir", str(out)]
    assert main([*words, "--out", str(out / "out"), "--docs", str(out / "page.md")]) == 0
    return out, json.loads((out / "out" / "claims.json").read_text())


def test_claims_are_measured_where_they_can_be_and_else_say_what_they_need(measured):
    _, found = measured
    rows = found["rows"]
    assert [row["verdict"] for row in rows] == [
        "reproduced",
        "not reproduced (convention not stated)",
        "reproduced (convention not stated)",
        "different convention",
        "not run: its task has no metric 'f1'; known: exact_match,flexible-extract, exact_match,strict-match",
        "not run: needs weights seven-7b/, a CUDA device, data gsm8k",
        "not run: needs task mbpp",
        "not run: needs the system it is faster than",
    ]
    assert [bool(row["measured"]) for row in rows] == [True, True, True, True, False, False, False, False]
    assert rows[0]["measured"]["n"] == 3
    assert rows[0]["measured"]["score"] == rows[1]["measured"]["score"] == 1.0, "measured, not copied"
    assert len({row["run"] for row in rows[:5]}) == 1, "claims that share a run share it"
    assert rows[5]["run"] is None
    assert rows[0]["convention"]["measured"].startswith("lm-eval ")
    assert rows[5]["convention"] == {"published": "not stated", "measured": None}


def test_the_tables_tell_what_was_found(measured, capsys):
    out, found = measured
    page = (out / "page.md").read_text()
    assert page == (out / "out" / "claims.md").read_text() == verdicts.page(found)
    assert "| seven | gsm8k | exact_match,flexible-extract | 91.9 | – |  | not stated | not run: needs weights" in page
    assert "another → lm-eval" in page
    assert "- here: measured" in page
    assert str(out) not in page, "no path of this machine"
    capsys.readouterr()
    verdicts.print_verdicts(found)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    counted = "1 reproduced, 1 not reproduced (convention not stated), 1 reproduced (convention"
    assert counted in " ".join(printed.split())
    day, sha = found["rows"][0]["taken"]["started"][:10], found["rows"][0]["taken"]["commit"]
    at = f"commit {sha[:7]}" if sha else "version"
    assert f"measured {day}, {at}" in printed
    assert f"| {day}, {at}" in page
    assert "not reproduced" in (out / "out" / "report.html").read_text()


def test_what_was_measured_before_is_shown_only_on_request(tmp_path):
    """A stored score that nobody could measure: gone with the next measurement, told with its own day by --resume."""
    (tmp_path / "mine.toml").write_text(LEDGER)
    words = ["reproduce", "--ledger", str(tmp_path / "mine.toml"), "--systems", "tiny", "--out", str(tmp_path / "out")]

    def first(*more):
        assert main([*words, *more]) == 0
        return json.loads((tmp_path / "out" / "claims.json").read_text())["rows"][0]

    folder = Path(first("--data-dir", str(tmp_path))["run"])
    result, where = (json.loads((folder / name).read_text()) for name in ("result.json", "environment.json"))
    for line in result["lines"]:
        line["score"] = line["low"] = 0.25
    where |= {"started": "2001-02-03T04:05:06+00:00", "git": {"commit": "abcdef0123", "dirty": True}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(json.dumps(where))
    again = first("--data-dir", str(tmp_path), "--resume")
    assert again["measured"]["score"] == 0.25, "taken as it stands"
    assert verdicts.taken(again) == "2001-02-03, commit abcdef0 with changes"
    anew = first("--data-dir", str(tmp_path))
    assert anew["measured"]["score"] == 1.0
    assert anew["run"] == str(folder)
    assert anew["taken"]["started"] > "2026"
    (folder / "notes.md").write_text("mine")
    held = (folder / "samples.jsonl").read_bytes()
    assert "holds notes.md, which was not written here" in first("--data-dir", str(tmp_path))["verdict"]
    assert (folder / "samples.jsonl").read_bytes() == held


def test_a_claim_that_cannot_be_asked_for_is_named_before_the_first_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_text(LEDGER.replace('profile = "lm-eval"', 'profile = "lm-evl"'))
    held = read_claims(tmp_path / "mine.toml")
    told = []

    def measure(spec, claims, out, *, resume):
        told.append(capsys.readouterr().err)
        return [reproduce.Row(one, "reproduced") for one in claims]

    monkeypatch.setattr(reproduce, "measure", measure)
    rows = reproduce.reproduce(held, held.claims[:5], tmp_path / "out", Place(tmp_path, str(tmp_path)))["rows"]
    assert "tiny mini_gsm8k_1 100 (here): profile='lm-evl'" in told[0]
    assert [row["verdict"].partition("=")[0] for row in rows] == ["not run: profile", *["reproduced"] * 4]


def test_the_hub_is_asked_once_and_before_its_clients_are_there(tmp_path, monkeypatch):
    calls = []
    reproduce._hub.cache_clear()
    monkeypatch.setattr(reproduce.data, "hub_reachable", lambda: calls.append("hub"))
    monkeypatch.setattr(reproduce.data, "go_offline", lambda: calls.append("offline"))
    monkeypatch.setattr(reproduce, "missing", lambda *_: calls.append("claim") or ["weights"])
    held = read_claims()
    reproduce.reproduce(held, held.claims[:2], tmp_path, Place(tmp_path))
    assert calls == ["hub", "offline", "claim", "claim"]
    run = "import sys, fluid_eval.reproduce; print({'datasets', 'huggingface_hub', 'lm_eval'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout == "set()\n"
    reproduce._hub.cache_clear()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "nix"], "--systems nix: no such system; known: tiny-ar, tiny-fluid verified"),
        (["--systems", "FLUID-7B,nix", "--table", "main"], "--systems nix: no such system in --table main; known: LLa"),
        (
            ["--systems", "tiny-", "--table", "own"],
            "--systems tiny-: no such system in --table own; known: LLaDA-8B, Q",
        ),
        (["--table", "mian"], "--table mian: unknown; known: tiny, main"),
    ],
)
def test_a_name_that_nothing_has_is_refused(tmp_path, capsys, words, message):
    assert main(["reproduce", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_value_may_be_off_by_its_own_rounding():
    """Half of the last published digit, which a number alone need not show."""
    assert claim(value=91.9).rounding == pytest.approx(0.05)
    speed = claim(unit="tok/s", metric="tokens_per_second", value=3700.0, decimals=0)
    assert speed.rounding == pytest.approx(0.5)
    two = claim(unit="tok/forward", metric="tokens_per_forward", value=2.0, decimals=2, profile="lm-eval")
    assert two.rounding == pytest.approx(0.005)
    found = Interval(1.97, 1.96, 1.98, 9)
    assert judge(two, found, "lm-eval") == "not reproduced"
    assert judge(replace(two, decimals=1), found, "lm-eval") == "reproduced"
    shown = [verdicts.published(reproduce.Row(one, "").to_dict()) for one in (speed, two, replace(two, to=2.5))]
    assert shown == ["3700 tok/s", "2.00 tok/fwd", "2.00–2.50 tok/fwd"]
    for one in read_claims().claims:
        if one.source == "tiny family" or one.value >= 100:
            assert one.rounding == {"%": 0.05, "tok/forward": 0.005, "tok/s": 0.5}[one.unit], one.cell


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """Weights from a folder or the hub, a device, data, agreement to run code, the hardware of a speed."""
    for door in (reproduce._cuda, reproduce._at_hand, reproduce._hub):
        door.cache_clear()
    hub, cuda = [False], [""]
    monkeypatch.setattr(reproduce, "_hub", lambda: hub[0])
    monkeypatch.setattr(reproduce, "isolation", lambda: Found(None, ()))
    monkeypatch.setattr(reproduce, "_cuda", lambda: cuda[0])
    monkeypatch.setattr(reproduce, "_at_hand", lambda source, data_dir: data_dir is not None)
    system = System("s", "big", hub="who/big")

    def needs(one, system=system, **place):
        return reproduce.missing(one, system, Place(tmp_path / "models", **place))

    code = claim(task="humaneval")
    speed = claim(unit="tok/s", metric="tokens_per_second", hardware="H100")
    assert needs(code) == ["weights big/", "a CUDA device", "--allow-unsafe-code", "data humaneval"]
    hub[0] = True
    assert needs(code, data_dir="d", code=True) == ["a CUDA device"]
    assert needs(code, replace(system, device="cpu"), data_dir="d", code=True) == []
    hub[0] = False
    (tmp_path / "models" / "big").mkdir(parents=True)
    cuda[0] = "NVIDIA A100"
    assert needs(claim(), data_dir="d") == []
    assert needs(speed, data_dir="d") == ["H100"]
    unstated = "the hardware it was measured on, which is not stated"
    assert needs(replace(speed, hardware=""), data_dir="d") == [unstated]
    cuda[0] = ""
    assert needs(replace(speed, hardware=""), data_dir="d") == ["a CUDA device", unstated]
    (likelihood,) = needs(replace(speed, task="mini_mmlu_1"), data_dir="d")
    assert likelihood == "a form of mini_mmlu_1 with written answers (here it is scored by likelihood)"
    assert needs(replace(speed, task="mini"), data_dir="d", code=True) == ["a CUDA device", "H100"], "its others write"
    cuda[0] = "NVIDIA H100 PCIe"
    assert needs(speed, data_dir="d") == []
    assert needs(claim(), replace(system, run={"decoder": {"name": "tidar"}})) == ["decoder tidar"]
    assert needs(claim(), System("t", "tiny-ar", device="cpu"), data_dir="d") == [], "bundled weights are here"
