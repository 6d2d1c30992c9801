"""Names on the command line: typos, lm-eval's flags, shell completion, run folders and their list."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import argcomplete
import pytest

from fluid_eval.cli import lm_eval_names
from fluid_eval.cli.completion import attach
from fluid_eval.cli.main import COMMANDS, main, parser
from fluid_eval.cli.options import values_of
from fluid_eval.common.spec import build_spec
from fluid_eval.running.job import default_folder
from fluid_model.common.names import close_to, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
TYPOS = {
    "command": (["rnu"], "fluid-eval: command 'rnu' is unknown; did you mean run"),
    "command of another kind": (["evaluate-all"], "known: run, sweep"),
    "flag": (["run", "--moddel", "x"], "fluid-eval run: --moddel is no flag; did you mean --model"),
    "one word too many": (["run", "a.toml", "b.toml"], "'b.toml' is one word too many"),
    "flag of lm-eval": (["run", "--model_args", "pretrained=x"], "--model-args is no flag here; write --model FOLDER"),
    "setting": (["run", "--set", "decoder.confidenc=1"], "did you mean decoder.confidence"),
    "value": (["run", "--device", "cdua"], "model.device='cdua' is unknown; did you mean cuda?"),
    "decoder": (["run", "--decoder", "fluud"], "decoder='fluud' is unknown; did you mean fluid?"),
    "profile": (["run", "--profile", "fluid-papr"], "did you mean fluid-paper?"),
    "task": (["run", "--tasks", "mini_gsm8"], "did you mean mini_gsm8k"),
    "bundled model": (["run", "--model", "tiny-fliud"], "did you mean tiny-fluid"),
    "sampling without a temperature": (["run", "--gen_kwargs", "do_sample=true"], "needs a temperature above 0"),
    "argument of generation": (["run", "--gen_kwargs", "until=x"], "stops belong to the protocol"),
    "unknown argument of generation": (["run", "--gen_kwargs", "beams=4"], "beams is unknown; known: temperature"),
}


@pytest.mark.parametrize("case", TYPOS)
def test_a_typo_is_one_line_that_names_what_was_meant(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = TYPOS[case]
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("fluid-eval")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_close_names_ignore_case_and_are_few():
    assert close_to("GSM8k", ["gsm8k", "mbpp"]) == ["gsm8k"]
    assert len(close_to("mmlu", [f"mmlu_{n}" for n in range(9)])) == 3
    assert did_you_mean("zebra", ["gsm8k"]) == ""


def settings(*words: str) -> dict:
    return values_of(parser().parse_args(["run", "--model", "tiny-ar", "--tasks", "mini_gsm8k", *words]))


PAIRS = {
    "underscores": (["--num_fewshot=2", "--batch_size", "4"], ["--num-fewshot", "2", "--batch-size", "4"]),
    "chat template": (["--apply_chat_template"], ["--chat"]),
    "named template": (["--apply_chat_template", "tool"], ["--chat", "--set", "chat.template=tool"]),
    "multiturn": (["--fewshot_as_multiturn", "false"], ["--set", "chat.multiturn=false"]),
    "generation": (
        ["--gen_kwargs", "do_sample=true,temperature=0.8,top_p=0.95,max_gen_toks=64"],
        ["--set", "decoder.temperature=0.8", "--set", "decoder.top_p=0.95", "--max-new-tokens", "64"],
    ),
    "tasks folder": (["--include_path", "mine"], ["--tasks-dir", "mine"]),
    "nothing to ask for": (["--log_samples", "--confirm_run_unsafe_code"], []),
}


@pytest.mark.parametrize("case", PAIRS)
def test_names_of_lm_eval_are_settings_here(case):
    theirs, ours = PAIRS[case]
    assert settings(*theirs) == settings(*ours)


def test_the_output_path_is_the_run_folder():
    assert parser().parse_args(["run", "--output_path", "x"]).out == Path("x")


def test_every_accepted_name_parses_and_the_page_shows_both_tables():
    flags = {flag for action in COMMAND._actions for flag in action.option_strings}
    page = (ROOT / "docs/coming-from-lm-eval.md").read_text()
    for name, counterpart in lm_eval_names.ACCEPTED.items():
        assert name.replace("_", "-") in flags
        assert f"| `{name}` | {counterpart} |" in page
    for name, counterpart in lm_eval_names.INSTEAD.items():
        assert name not in flags
        assert f"| `{name.replace('-', '_').replace('__', '--')}` | {counterpart} |" in page


COMMAND = next(a.choices["run"] for a in parser()._actions if isinstance(getattr(a, "choices", None), dict))


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "fluid-eval swe": {"sweep"},
        "fluid-eval run --max-n": {"--max-new-tokens"},
        "fluid-eval run --model tiny-n": {"tiny-nbdiff"},
        "fluid-eval tax --parent tiny-a": {"tiny-ar"},
        "fluid-eval run --tasks mini_gsm8k,mini_human": {"mini_gsm8k,mini_humaneval"},
        "fluid-eval run --set decoder.conf": {"decoder.confidence="},
        "fluid-eval sweep --sweep decoder.conf": {"decoder.confidence="},
        "fluid-eval run --decoder nb": {"nbdiff"},
        "fluid-eval settings chat.mult": {"chat.multiturn"},
        "fluid-eval run --profile fluid": {"fluid-paper"},
    }.items(),
)
def test_completion(line, expected):
    commands = parser()
    attach(commands)
    finder = argcomplete.CompletionFinder(commands)
    _, prefix, _, words, colon = argcomplete.split_line(line, len(line))
    found = {word.strip() for word in finder._get_completions(words, prefix, "", colon)}
    assert expected <= found
    assert len(found) <= len(expected) + 4


def test_the_shell_is_answered(tmp_path):
    """As the script of register-python-argcomplete asks."""
    line = "fluid-eval khe"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    answer = tmp_path / "answer"
    with answer.open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        script = f"exec {sys.executable} -m fluid_eval 8>&{file.fileno()} 9>/dev/null"
        subprocess.run(
            ["bash", "-c", script], env={**os.environ, **asked}, pass_fds=[file.fileno()], check=True, cwd=ROOT
        )
    assert answer.read_text().strip() == "khead"


def spec(tasks: str, model: str):
    return build_spec({"tasks": tasks, "model": model, "decoder": "nbdiff"})


def test_run_folders_have_short_names():
    assert default_folder(spec("gsm8k,math500", "hub/Some-7B")).name.startswith("gsm8k+math500-Some-7B-nbdiff-")
    four = default_folder(spec("mini_gsm8k,mini_math,mini_humaneval,mini_mmlu", "tiny-nbdiff"))
    assert four.name.startswith("mini_gsm8k+3-tiny-nbdiff-nbdiff-")
    long = default_folder(spec("a_task_with_a_name_that_never_ends_a,b", "hub/A-model-with-a-name-that-never-ends-7B"))
    assert len(str(long)) <= 70
    assert long.name.startswith("a_task_with_a_name_tha+1-A-model-")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "runs"
    words = ["--tasks", "mini_gsm8k_1", "--model", "tiny-ar", "--limit", "2", "--json", "--out", str(folder / "a")]
    assert main(["run", *words]) == 0
    return folder


def listed(folder, capsys) -> list[dict]:
    assert main(["runs", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_lists_what_the_folders_hold(finished, capsys, monkeypatch):
    capsys.readouterr()
    (entry,) = listed(finished, capsys)
    stored = json.loads((finished / "a" / "result.json").read_text())
    assert (entry["folder"], entry["state"], entry["model"]) == (str(finished / "a"), "finished", "tiny-ar")
    assert (entry["decoder"], entry["tasks"], entry["started"]) == ("ar", ["mini_gsm8k_1"], stored["started"])
    (score,) = entry["scores"]
    line = stored["lines"][0]
    assert [score[n] for n in ("task", "metric", "value", "low", "high", "n")] == [
        line[n] for n in ("task", "metric", "score", "low", "high", "n")
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "finished  tiny-ar  decoder ar" in out
    assert all(len(each) <= 80 for each in out.splitlines() if not each.startswith(str(finished)))


def test_runs_says_the_state_of_each(finished, capsys, tmp_path):
    import shutil

    capsys.readouterr()
    for name in ("unhealthy", "incomplete", "unfinished", "running", "unreadable"):
        shutil.copytree(finished / "a", tmp_path / name)
    result = json.loads((finished / "a" / "result.json").read_text())
    gate = {"gate": "length limit", "task": "x", "count": 1, "n": 2, "threshold": 0.1, "keys": [], "share": 0.5}
    (tmp_path / "unhealthy/result.json").write_text(json.dumps({**result, "health": [{**gate, "ok": False}]}))
    (tmp_path / "incomplete/result.json").write_text(json.dumps({**result, "lost": {"x/1": "memory"}}))
    (tmp_path / "unfinished/result.json").unlink()
    (tmp_path / "unreadable/spec.json").write_text("[]")
    with (tmp_path / "running/samples.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        entries = listed(tmp_path, capsys)
        assert main(["runs", str(tmp_path)]) == 0
    assert {Path(entry["folder"]).name: entry["state"] for entry in entries} == {
        name: name for name in ("unhealthy", "incomplete", "unfinished", "running", "unreadable")
    }
    assert "unfinished: no result yet; --resume goes on" in capsys.readouterr().out


def test_runs_without_a_folder_says_what_to_do(capsys, tmp_path):
    assert main(["runs", str(tmp_path / "no")]) == 2
    assert "no such folder; fluid-eval run makes runs/" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs below" in capsys.readouterr().out


def test_every_command_has_help_and_an_example(capsys):
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert command.EXAMPLE.split()[1] in capsys.readouterr().out
