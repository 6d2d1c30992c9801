"""The ledger's claims: checked one by one, measured or honestly not, judged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fluid_eval.benchmarks import lm_eval_tasks, profiles
from fluid_eval.claims import reproduce
from fluid_eval.claims.ledger import Claim, System, read_claims
from fluid_eval.claims.measured_before import NEVER_TRIED
from fluid_eval.claims.reproduce import Resources
from fluid_eval.claims.verdicts import Finding, Judgement, judge
from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.common.stats import Interval
from fluid_eval.output import claims_tables
from fluid_eval.output.terminal import FORWARDS
from fluid_eval.sandbox.ladder import IsolationHere
from fluid_model import ConfigError
from fluid_model.checkpoints import gguf_files

LEDGER = """
source = [{ name = "here", cite = "measured" }, { name = "ours", cite = "our own", ours = true }]
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
  { table = "tiny", system = "tiny", task = "mini_gsm8k_1", metric = "exact_match,strict-match", value = 100.0, source = "ours", profile = "lm-eval", run = { limit = 3 } },
  { table = "main", system = "seven", task = "gsm8k", metric = "exact_match,flexible-extract", value = 91.9, source = "here" },
  { table = "main", system = "seven", task = "mbpp", metric = "pass@1", value = 50.0, source = "here" },
  { table = "speed", system = "seven", task = "gsm8k", metric = "speed-up", unit = "times", value = 2.3, source = "here" },
]
"""  # noqa: E501


def claim(system="s", task="gsm8k", value=50.0, source="paper", **more):
    return Claim(**{"table": "main", "metric": "m", **more}, system=system, task=task, value=value, source=source)


def test_every_bundled_claim_is_whole_and_can_be_asked_for():
    """Settings that no run takes, or that a later version would not know, are found here and not after hours."""
    result = read_claims()
    assert len(result.claims) >= 170
    assert {c.table for c in result.claims} == {"tiny", "smol", "main", "ablation", "speed", "own", "field"}
    for one in result.claims:
        settings = reproduce.run_settings(one, result)
        if settings.get("decoder") in (None, "ar", "fluid", "nbdiff", "llada") or isinstance(settings["decoder"], dict):
            build_spec({"tasks": [one.task], "model": "m", "profile": one.profile or "lm-eval", **settings})


def test_a_packaged_model_is_found_where_its_package_is(tmp_path, monkeypatch):
    system, resources = System("any", "packaged", device="cpu"), Resources(tmp_path)
    assert resources.model(system) is None
    for module, expected in (("json", None), ("carries_a_model", "packaged")):
        monkeypatch.setitem(gguf_files.PACKAGED, "packaged", (module, "package", "Title"))
        (tmp_path / "carries_a_model").mkdir(exist_ok=True)
        (tmp_path / "carries_a_model" / "__init__.py").touch()
        (tmp_path / "carries_a_model" / "a.gguf").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        assert resources.model(system) == expected
    (tmp_path / "packaged").mkdir()
    assert resources.model(system) == str(tmp_path / "packaged"), "a folder below --models-dir comes first"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 91.9", "value = 191.9", r"mine\.toml, claim 7 \(seven gsm8k\): value=191.9 must lie in"),
        ("value = 91.9", 'value = "many"', r"claim 7 \(seven gsm8k\): value='many' must be a number"),
        ("value = 91.9, ", "", r"claim 7 \(seven gsm8k\): value is missing"),
        ("value = 91.9", "value = 91.9, shots = 5", "claim 7 .*: shots is no setting; known: table, system"),
        ('table = "speed"', 'table = "x"', r"claim 9 \(seven gsm8k\): table='x' is unknown; known: tiny, smol, main"),
        ('system = "seven", task = "mbpp"', 'system = "eight", task = "mbpp"', "claim 8 .*: system='eight' is not in"),
        ('value = 50.0, source = "here"', 'value = 50.0, source = "there"', "claim 8 .*: source='there' is not in"),
        ('task = "mbpp", metric = "pass@1"', 'task = "gsm8k", metric = "exact_match,flexible-extract"', "stands twice"),
        ('metric = "speed-up"', 'metric = "tempo"', "claim 9 .*: metric='tempo': unit times needs speed-up"),
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


def test_a_protocol_is_told_by_what_ran_and_not_by_its_name(tmp_path):
    """The same name over other shots is another convention; another name over the same content is the same."""
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(8)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.toml").write_text('about = "x"\n[tasks.gsm8k]\nsource = "y"\nnum_fewshot = 5\n')
    base = {"tasks": ["gsm8k"], "model": "m", "data_dir": str(data.parent)}

    def ran(**more):
        spec = build_spec({**base, **more})
        tasks = lm_eval_tasks.load_tasks(spec)
        return spec, {"protocol": profiles.describe(spec, tasks["tasks"], {"gsm8k": ["gsm8k"]}, None)}

    plain, other = ran(), ran(num_fewshot=0)
    stated = claim(profile="lm-eval")
    assert reproduce.as_stated(stated, *plain)
    assert not reproduce.as_stated(stated, *other), "lm-eval by name, 0-shot by content"
    assert reproduce.as_stated(replace(stated, run={"num_fewshot": 0}), *other), "the claim says so itself"
    assert reproduce.as_stated(replace(stated, profile=str(tmp_path / "mine.toml")), *plain), (
        "another name, one content"
    )
    assert reproduce.as_stated(stated, *ran(profile=str(tmp_path / "mine.toml")))
    stale = {"protocol": {**plain[1]["protocol"], "hash": "0" * 12}}
    assert not reproduce.as_stated(stated, plain[0], stale), "stored under what the profile was once"
    assert not reproduce.as_stated(stated, plain[0], {}), "not recorded"
    assert reproduce.as_stated(claim(), *other), "it states none"
    assert not reproduce.as_stated(claim(convention="0-shot"), *other), "words are not compared"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The little ledger above, measured by the command."""
    out = tmp_path_factory.mktemp("claims")
    (out / "mine.toml").write_text(LEDGER)
    words = ["reproduce", "--ledger", str(out / "mine.toml"), "--models-dir", str(out), "--data-dir", str(out)]
    assert main([*words, "--out", str(out / "out"), "--docs", str(out / "page.md")]) == 0
    return out, json.loads((out / "out" / "claims.json").read_text())


def test_claims_are_measured_where_they_can_be_and_else_say_what_they_need(measured):
    _, result = measured
    rows = result["rows"]
    assert [row["verdict"] for row in rows] == [
        "cannot tell: n = 3 is too few for 3.0 points, about 99 would do if it is right",
        "not reproduced (convention not stated): 100.0 points off, surely more than 3.0 points",
        "cannot tell (convention not stated): n = 3 is too few for an interval",
        "different convention",
        "not run: its task has no metric 'f1'; known: exact_match,flexible-extract, exact_match,strict-match",
        "re-run, equal",
        "not run: needs weights seven-7b/, a CUDA device, data gsm8k",
        "not run: needs weights seven-7b/, a CUDA device, a hub for the data of mbpp",
        "not run: needs the system it is faster than",
    ]
    assert [bool(row["measured"]) for row in rows] == [True, True, True, True, False, True, False, False, False]
    assert rows[0]["measured"]["n"] == 3
    assert rows[0]["measured"]["score"] == rows[1]["measured"]["score"] == 1.0, "measured, not copied"
    assert len({row["run"] for row in rows[:6]}) == 1, "claims that share a run share it"
    assert rows[6]["run"] is None
    assert result["external"] == {"claims": 8, "measured": 4}, "our own are no claims of others"
    assert rows[0]["convention"]["measured"].startswith("lm-eval ")
    assert rows[6]["convention"] == {"published": "not stated", "measured": None}


def test_what_was_measured_is_judged_again_by_the_ledger_of_now(measured, tmp_path, capsys):
    """The same verdicts by the same ledger; another published number has another verdict, a new claim none."""
    out, result = measured
    ledger = tmp_path / "mine.toml"
    words = ["reproduce", "--ledger", str(ledger), "--measured", str(out / "out" / "claims.json")]
    ledger.write_text(LEDGER)
    assert main([*words, "--out", str(tmp_path / "same")]) == 0
    assert json.loads((tmp_path / "same" / "claims.json").read_text()) == result
    ledger.write_text(LEDGER.replace('extract", value = 0.0', 'extract", value = 99.0').replace('"mbpp"', '"mmlu"'))
    assert main([*words, "--out", str(tmp_path / "other")]) == 0
    rows = json.loads((tmp_path / "other" / "claims.json").read_text())["rows"]
    assert rows[1]["measured"] == result["rows"][1]["measured"]
    assert rows[1]["verdict"].startswith("cannot tell (convention not stated)")
    assert rows[7]["verdict"] == f"not run: {NEVER_TRIED}"
    assert main([*words[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err.splitlines()[-1]


def test_the_tables_tell_what_was_found(measured, capsys):
    out, result = measured
    page = (out / "page.md").read_text()
    assert page == (out / "out" / "claims.md").read_text() == claims_tables.page(result)
    assert (
        "| seven | gsm8k | exact_match,flexible-extract | 91.9 | – |  | not stated |  | not run: needs weights" in page
    )
    assert "another → lm-eval" in page
    assert "- here: measured" in page
    assert str(out) not in page, "no path of this machine"
    capsys.readouterr()
    claims_tables.print_verdicts(result)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert any(line.endswith(" re-run, equal") for line in printed.splitlines()), "a verdict without reason is one line"
    assert FORWARDS in " ".join(printed.split())
    counted = "1 cannot tell, 1 not reproduced (convention not stated), 1 cannot tell (convention not stated)"
    assert counted in " ".join(printed.split())
    assert "Claims of others measured here: 4 of 8" in printed
    assert "Claims of others measured here: 4 of 8" in page
    day, sha = result["rows"][0]["taken"]["started"][:10], result["rows"][0]["taken"]["commit"]
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
    assert claims_tables.taken(again) == "2001-02-03, commit abcdef0 with changes"
    anew = first("--data-dir", str(tmp_path))
    assert anew["measured"]["score"] == 1.0
    assert anew["run"] == str(folder)
    assert anew["taken"]["started"] > "2026"
    (folder / "notes.md").write_text("mine")
    stored = (folder / "samples.jsonl").read_bytes()
    assert "holds notes.md, which was not written here" in first("--data-dir", str(tmp_path))["verdict"]
    assert (folder / "samples.jsonl").read_bytes() == stored


def test_a_claim_that_cannot_be_asked_for_is_named_before_the_first_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_text(LEDGER.replace('profile = "lm-eval"', 'profile = "lm-evl"'))
    stored = read_claims(tmp_path / "mine.toml")
    messages = []

    def measure(spec, claims, out, *, resume):
        messages.append(capsys.readouterr().err)
        return [reproduce.MeasuredClaim(one, Judgement("reproduced")) for one in claims]

    monkeypatch.setattr(reproduce, "measure", measure)
    rows = reproduce.reproduce(stored, stored.claims[:5], tmp_path / "out", Resources(tmp_path, str(tmp_path)))["rows"]
    assert "tiny mini_gsm8k_1 100 (here): profile='lm-evl'" in messages[0]
    assert [row["verdict"].partition("=")[0] for row in rows] == ["not run: profile", *["reproduced"] * 4]


def test_the_hub_is_asked_once_and_before_its_clients_are_there(tmp_path, monkeypatch):
    calls = []
    reproduce._hub.cache_clear()
    monkeypatch.setattr(reproduce.datasets, "hub_reachable", lambda: calls.append("hub"))
    monkeypatch.setattr(reproduce.datasets, "go_offline", lambda: calls.append("offline"))
    monkeypatch.setattr(reproduce, "missing", lambda *_: calls.append("claim") or ["weights"])
    stored = read_claims()
    reproduce.reproduce(stored, stored.claims[:2], tmp_path, Resources(tmp_path))
    assert calls == ["hub", "offline", "claim", "claim"]
    run = (
        "import sys, fluid_eval.claims.reproduce; print({'datasets', 'huggingface_hub', 'lm_eval'} & set(sys.modules))"
    )
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
        (["--table", "mian"], "--table mian: unknown; known: tiny, smol, main"),
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
    ours = [Finding(one, Interval(1.97, 1.96, 1.98, 9), own=True) for one in (two, replace(two, decimals=1))]
    assert [judgement.verdict for judgement in judge(ours)] == ["re-run, differs: by 0.03 tok/forward", "re-run, equal"]
    shown = [
        claims_tables.published(reproduce.MeasuredClaim(one, Judgement("")).to_dict())
        for one in (speed, two, replace(two, to=2.5))
    ]
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
    monkeypatch.setattr(reproduce, "isolation", lambda: IsolationHere(None, ()))
    monkeypatch.setattr(reproduce, "_cuda", lambda: cuda[0])
    monkeypatch.setattr(reproduce, "_at_hand", lambda source, data_dir: data_dir is not None)
    system = System("s", "big", hub="who/big")

    def needs(one, system=system, **place):
        return reproduce.missing(one, {**system.run, **one.run}, Resources(tmp_path / "models", **place), system)

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
