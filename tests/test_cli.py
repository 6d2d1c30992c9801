"""The command line: bad input is one line that names the value and the known ones, exit 2, nothing written."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_eval.benchmarks import datasets
from fluid_eval.benchmarks.datasets import HUB_TIMEOUT
from fluid_eval.cli import EXIT_UNHEALTHY
from fluid_eval.cli.main import main
from fluid_eval.output.terminal import FORWARDS
from fluid_eval.sandbox.ladder import strongest_tier
from fluid_model.forward import compiled
from fluid_model.forward.compiled import build

ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["run", *map(str, words)])
    return code, *capsys.readouterr()


def write_gsm8k(folder: Path, count: int = 6) -> Path:
    """A few rows in the layout of --data-dir."""
    (folder / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"<<{n}+{n}={2 * n}>>\n#### {2 * n}"} for n in range(count)]
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def little_data(tmp_path_factory):
    return write_gsm8k(tmp_path_factory.mktemp("data"))


def test_help_is_quick_and_needs_no_torch():
    program = "import sys; sys.argv = ['fluid-eval', 'run', '--help']\nfrom fluid_eval.cli.main import main\n"
    program += (
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5, "of a processor, whoever else wants it"


BAD = {
    "unknown task": (
        ["--tasks", "gsm9k"],
        "task 'gsm9k' is unknown; did you mean gsm8k",
    ),
    "no such model": (["--model", "./nowhere"], "model='./nowhere': no such folder"),
    "model without config.json": (["--model", "{empty}"], "the folder holds no config.json"),
    "decoder without head": (["--decoder", "fluid"], "decoder=fluid needs a K-head"),
    "unknown decoder": (["--decoder", "beam"], "decoder='beam' is unknown; did you mean dream? known: ar, fluid"),
    "negative limit": (["--limit", "-1"], "limit=-1 must be at least 1"),
    "unknown setting": (["--set", "decoder.gama=1"], "decoder.gama is no setting of decoder 'ar'; known: decoder."),
    "unknown field": (["--set", "colour=red"], "colour is no setting; known: tasks"),
    "unknown tau": (["--set", "model.tau=3.0"], "model.tau=3.0: "),
    "unwritable out": (["--out", "{empty}/file/run"], "cannot be written"),
    "limit that is no number": (["--limit", "many"], "limit='many' must be a whole number"),
    "pattern without a match": (["--tasks", "gsm9*"], "task pattern 'gsm9*' matches no name"),
    "seed below zero": (["--seed", "-1"], "seed=-1 must lie in [0, 4294967295]"),
    "decoder that is no name": (["--set", "decoder=3"], "decoder=3 must be a name or a table"),
    "decoder name that is no name": (["--set", "decoder.name=[]"], "decoder=[] is unknown; known: ar, fluid"),
    "address without a cluster": (["--ray-address", "x:1"], "the inline engine has none; use --engine ray"),
    "too many shots": (["--num-fewshot", "7"], "num_fewshot=7: task gsm8k has 6 examples to draw from"),
    "no data": (["--data-dir", "{empty}"], "gsm8k/train.jsonl: no such file"),
    "too many new tokens": (["--max-new-tokens", "256"], "leaves no room for a prompt in the model's window of 256"),
    "no cuda": (["--device", "cuda"], "device=cuda: torch sees no CUDA device here"),
    "missing spec": (["{empty}/spec.toml"], "spec.toml: cannot be read: No such file"),
    "task twice": (["--tasks", "mmlu,mmlu_anatomy"], "Duplicate task 'mmlu_anatomy'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(capsys, tmp_path, monkeypatch, tiny_model, little_data, case):
    import torch

    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if case == "task twice":
        request_mmlu(little_data)
    words, message = BAD[case]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "file").touch()
    monkeypatch.chdir(tmp_path)
    words = [word.format(empty=empty) for word in words]
    valid = {
        "--tasks": "gsm8k",
        "--model": tiny_model,
        "--data-dir": little_data,
        "--max-new-tokens": 8,
        "--num-fewshot": 0,
    }
    for flag, value in valid.items():
        if flag not in words:
            words += [flag, str(value)]
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("fluid-eval: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "file"], "nothing was written"


def request_mmlu(folder: Path) -> None:
    """Just enough rows for every subject."""
    if (folder / "mmlu").exists():
        return
    from fluid_eval.common.paths import resource

    subjects = [f.stem.removeprefix("mmlu_") for f in resource("tasks").glob("mmlu/mmlu_*.yaml")]
    (folder / "mmlu").mkdir()
    row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    for split, count in (("test", 1), ("dev", 5)):
        rows = [{**row, "subject": subject} for subject in subjects for _ in range(count)]
        (folder / "mmlu" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_no_hub_and_no_data_is_one_error_in_time(tmp_path, tiny_model, monkeypatch, capsys):
    """With a hub that is there and never answers, one question is waited for, as long as a question may take."""
    import datasets.config as datasets_config
    import huggingface_hub.constants as hub_constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    for library in (hub_constants, datasets_config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "HUB_TIMEOUT", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", hub)
        monkeypatch.setenv("NO_PROXY", "*")
        for library, name in ((hub_constants, "ENDPOINT"), (datasets_config, "HF_ENDPOINT")):
            monkeypatch.setattr(library, name, hub)
        for library, name in ((hub_constants, "HF_HUB_CACHE"), (datasets_config, "HF_DATASETS_CACHE")):
            monkeypatch.setattr(library, name, tmp_path / "hf")
        code, _, err = run(capsys, "--tasks", "gsm8k", "--model", tiny_model, "--out", tmp_path / "r")
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert HUB_TIMEOUT < 10
    assert code == 2
    assert "Either connect to the hub, or pass --data-dir DIR (or set FLUID_DATA_DIR)" in err
    assert not (tmp_path / "r").exists()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1", "for libraries imported later"


def test_a_spec_file_and_flags_that_override_it(capsys, tmp_path, tiny_model, tiny_fluid, little_data):
    file = tmp_path / "spec.toml"
    file.write_text(
        f'tasks = ["gsm8k"]\nlimit = 3\nmax_new_tokens = 8\nnum_fewshot = 0\ndata_dir = "{little_data}"\n'
        f'[model]\npath = "{tiny_fluid}"\n[decoder]\nname = "fluid"\nconfidence = 0.5\n'
    )
    code, out, _ = run(capsys, file, "--limit", 2, "--set", "decoder.max_horizon=4", "--out", tmp_path / "a", "--json")
    result = json.loads(out)
    assert code == EXIT_UNHEALTHY, "all hit the limit"
    assert {line["n"] for line in result["lines"]} == {2}
    assert result["decoder"] == {
        "name": "fluid", "rounds": "one", "confidence": 0.5, "min_horizon": 1, "max_horizon": 4, "verify": True,
        "slot_budget": None, "candidates": 4, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    off = [word for gate in ("length_limit", "no_answer") for word in ("--set", f"health.{gate}=1")]
    code, out, _ = run(capsys, file, "--decoder", "ar", "--model", tiny_model, "--out", tmp_path / "b", *off)
    assert code == 0
    assert "decoder ar" in out
    assert FORWARDS in out.splitlines()
    long = [line for line in out.splitlines() if len(line) > 80]
    assert all(line.startswith(("run folder", "as a page", str(tiny_model))) for line in long)


def test_the_same_command_again_shows_what_it_made(capsys, tmp_path, tiny_model, little_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--tasks", "gsm8k", "--model", tiny_model, "--data-dir", little_data, "--limit", 2]
    words += ["--max-new-tokens", 8, "--num-fewshot", 0, "--json"]
    code, first, _ = run(capsys, *words)
    again = run(capsys, *words)
    assert again[:2] == (code, first)
    assert "this run is finished: its stored result follows; --out DIR runs it again\n" in again[2]
    (result,) = tmp_path.glob("runs/*/result.json")
    code, _, err = run(capsys, *words, "--out", result.parent)
    assert code == 2
    assert "holds a finished run of this spec; pass --resume to see its result" in err, (
        "a folder that was named is not assumed"
    )


def test_doctor(capsys, little_data, data_dir, monkeypatch):
    assert main(["doctor", "--data-dir", str(data_dir)]) == 0
    out = capsys.readouterr().out
    assert "ok: the main job can run here" in out
    assert f"isolation   {strongest_tier().name or 'none'}" in out
    assert ("forward     compiled" in out) == (compiled.library(4) is not None)
    monkeypatch.setattr(build, "_attempt", lambda lanes: (None, "no C compiler"))
    assert main(["doctor"]) == 0, "the mini suite runs without"
    out = capsys.readouterr().out
    assert "forward     explicit (no C compiler)" in out
    assert "note: no data of some benchmarks: connect to the hub, or pass --data-dir DIR" in out
    assert "ok: the mini suite, and what needs no benchmark data, can run here" in out
    assert main(["doctor", "--data-dir", str(little_data)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_finished(capsys, tmp_path, tiny_model, little_data, monkeypatch):
    from fluid_eval.results.run_folder import Run

    keep = Run.append

    def interrupted(self, record):
        keep(self, record)
        if len(self.samples) == 2:
            raise KeyboardInterrupt

    words = ["--tasks", "gsm8k", "--model", tiny_model, "--data-dir", little_data, "--max-new-tokens", 8]
    words += ["--num-fewshot", 0, "--out", tmp_path / "r"]
    monkeypatch.setattr(Run, "append", interrupted)
    code, _, err = run(capsys, *words)
    assert (code, "--resume goes on" in err) == (130, True)
    assert not (tmp_path / "r" / "result.json").exists()
    monkeypatch.setattr(Run, "append", keep)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "not finished of this spec; pass --resume" in err
    assert run(capsys, *words, "--resume")[0] == EXIT_UNHEALTHY, "whole: each answer at the limit of 8"
    assert len((tmp_path / "r" / "samples.jsonl").read_text().splitlines()) == 6
