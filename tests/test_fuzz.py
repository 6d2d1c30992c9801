"""What a stranger's files and words do to the commands: one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_eval.cli.console import in_one_line
from fluid_eval.cli.main import main
from fluid_eval.common.spec import build_spec
from fluid_eval.results.run_folder import Run, encode, read_samples
from fluid_model import ConfigError

from .fuzz import fuzz
from .runs import write_run

ROOT = Path(__file__).resolve().parents[1]
SPEC = {"tasks": ["gsm8k"], "model": {"path": "m"}}


@pytest.mark.parametrize("kind", ["spec", "words", "stored"])
def test_a_short_fuzz(kind):
    counts, bad = fuzz(7, seconds=5, most=12, kinds=[kind])
    assert bad == []
    assert counts[kind] > 0


@pytest.fixture
def stored(tmp_path):
    return write_run(tmp_path / "r")


def one_line(capsys, *words) -> tuple[int, str]:
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return code, err


@pytest.mark.parametrize("command", ["compare", "report", "audit", "khead"])
@pytest.mark.parametrize("harm", ["result {}", "samples folder", "tasks that are none"])
def test_what_is_no_run_is_told_in_one_line(stored, tmp_path, capsys, command, harm):
    if harm == "result {}":
        (stored / "result.json").write_text("{}")
        if command in ("audit", "khead"):
            pytest.skip("neither asks it for more than the protocol")
    elif harm == "samples folder":
        (stored / "samples.jsonl").unlink()
        (stored / "samples.jsonl").mkdir()
    else:
        (stored / "spec.json").write_text(json.dumps({**json.loads((stored / "spec.json").read_text()), "tasks": 3}))
    code, err = one_line(capsys, command, stored, *([write_run(tmp_path / "other")] if command == "compare" else []))
    assert code == 2
    assert f"{stored}/" in err or f"{stored}:" in err


def test_rescore_of_an_unknown_task(stored, capsys):
    spec = json.loads((stored / "spec.json").read_text())
    (stored / "spec.json").write_text(json.dumps({**spec, "tasks": ["gsm9k"]}))
    code, err = one_line(capsys, "rescore", stored, "--profile", "minimal")
    assert (code, "task 'gsm9k' is unknown" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slots", -1), ("slots", "9"), ("predicted", [10**9]), ("predicted", [0]), ("accepted", [-1]),
        ("forwards", {"round": -1}), ("written", [1, 2, 3]), ("written", ["x"]), ("rejected", [[1, 2]]),
    ],
)  # fmt: skip
def test_odd_traces_under_right_checksums(stored, capsys, name, value):
    records = list(read_samples(stored))
    records[3]["trace"][name] = value
    for record in records:
        record.pop("crc32", None)
    (stored / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    for command in ("report", "audit"):
        code, err = one_line(capsys, command, stored)
        assert (code, "line 4: not a sample (of its trace, " in err) == (2, True)


@pytest.mark.parametrize("other", [{"profile": "minimal"}, {"chat": {}}, {"extractor": "minimal"}])
def test_what_one_run_sets_and_the_other_does_not_is_named(tmp_path, other):
    for ours, theirs in ((SPEC, SPEC | other), (SPEC | other, SPEC)):
        folder = tmp_path / f"{'profile' in ours}{'chat' in ours}{'extractor' in ours}"
        run = Run(folder, build_spec(ours))
        run.begin({})
        run.close()
        with pytest.raises(ConfigError, match=rf"holds another run \({next(iter(other))} is .* there, .* here\)"):
            Run(folder, build_spec(theirs), resume=True)


def test_a_second_resume_while_the_first_ends(tmp_path):
    """Nothing is missing, so that neither begins: one ends the run, the other is told, and no sample is read askew."""
    record = {
        "key": "gsm8k/0", "task": "gsm8k", "doc_id": 0, "prompt": "p", "prompt_hash": "h", "output": "o",
        "output_ids": [1], "finish": "eos", "seconds": 0.1,
        "trace": {"forwards": {"prefill": 1}, "slots": 1, "predicted": [], "accepted": []},
    }  # fmt: skip
    begun = Run(tmp_path / "r", build_spec(SPEC))
    begun.begin({})
    begun.append(record)
    begun.close()
    first, second, late = (Run(tmp_path / "r", build_spec(SPEC), resume=True) for _ in range(3))
    assert second.samples["gsm8k/0"] == record
    first.finish([{**record, "scores": {"a": 1.0}}], {"lines": []})
    assert second.samples["gsm8k/0"] == record, "the file that was read stays open"
    with pytest.raises(ConfigError, match="another process wrote here just now"):
        second.finish([record], {"lines": []})
    with pytest.raises(ConfigError, match="another process wrote here just now"):
        late.samples["gsm8k/0"]
    assert [r["scores"] for r in read_samples(tmp_path / "r")] == [{"a": 1.0}]


@pytest.mark.slow
def test_an_output_that_is_full_or_knows_few_letters(stored, tmp_path):
    other = write_run(tmp_path / "other", "ar")

    def run(out, **more):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        words = [sys.executable, "-m", "fluid_eval", "compare", str(stored), str(other)]
        return subprocess.run(words, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)

    with open("/dev/full", "w") as full:
        done = run(full)
    assert (done.returncode, done.stderr) == (1, "fluid-eval: standard output: No space left on device\n")
    done = run(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "out of memory: .* GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), 1, "8 bytes"),
        (ImportError("libx.so: failed to map segment from shared object"), 1, "out of memory: .* libx.so"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "r/x"),
            1,
            "r/x: No such file or directory; what",
        ),
        (RuntimeError("Could not determine home directory."), 2, "there is no home directory here"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, code, message):
    reason, exit_code = in_one_line(error)
    assert exit_code == code
    assert re.search(message, reason)
    assert in_one_line(KeyError("spec"))[0] is None, "our own faults are not dressed up"


def test_no_home_is_no_reason_to_fail(monkeypatch):
    from fluid_eval.running import forward_time_cache
    from fluid_model.forward.forward_time import ForwardTime

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert forward_time_cache.known() == {}
    forward_time_cache._store({"a": ForwardTime([(1, 1.0)])})
    assert not Path("~").exists()


def test_letters_that_cannot_be_shown_become_question_marks(monkeypatch):
    from fluid_eval.cli.console import tolerate_any_output

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    tolerate_any_output()
    print("a – \ud800")
    sys.stdout.flush()
    assert raw.getvalue() == b"a ? ?\n"
