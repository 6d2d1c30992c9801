"""The run folder: append, resume, refuse, mend."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluid_eval
from fluid_eval.common.spec import build_spec
from fluid_eval.results.metrics import table_rows
from fluid_eval.results.run_folder import Run, encode, parse, read_samples
from fluid_model import ConfigError
from fluid_model.common.errors import RunError
from fluid_model.common.files import read_json

SPEC = build_spec({"tasks": ["gsm8k"], "model": {"path": "m"}})
OTHER = build_spec({"tasks": ["gsm8k"], "model": {"path": "m"}, "limit": 3})


def sample(n):
    return {
        "key": f"gsm8k/{n}",
        "task": "gsm8k",
        "doc_id": n,
        "prompt": "p",
        "prompt_hash": "h",
        "output_ids": [1, 2],
        "finish": "eos",
        "seconds": 0.1,
        "output": "Grüße \ud800 👋 \u2028",
        "trace": {"forwards": {"prefill": 1, "commit": 3}, "slots": 9, "predicted": [], "accepted": []},
        "scores": {"exact_match,strict": float(n % 2)},
    }


def fill(folder, count=3):
    run = Run(folder, SPEC)
    run.begin({"python": "3"})
    for n in range(count):
        run.append(sample(n))
    run.close()
    return folder


def test_nothing_is_written_before_begin(tmp_path):
    Run(tmp_path / "a" / "b", SPEC)
    assert list(tmp_path.iterdir()) == []


def test_samples_survive_and_are_resumed(tmp_path):
    run = Run(fill(tmp_path / "r"), SPEC, resume=True)
    assert list(run.samples.values()) == [sample(n) for n in range(3)]
    run.begin({})
    run.append(sample(3))
    run.finish(run.samples.values(), {"lines": []})
    frame = fluid_eval.load_results(tmp_path / "r")
    assert frame["score:exact_match,strict"].tolist() == [0, 1, 0, 1]
    assert frame["forwards:commit"].tolist() == [3] * 4
    assert read_json(tmp_path / "r" / "result.json") == {"lines": []}
    assert sorted(f.name for f in (tmp_path / "r").iterdir()) == [
        "environment.json", "result.json", "samples.jsonl", "spec.json",
    ]  # fmt: skip


def test_a_sample_is_on_disk_before_append_returns(tmp_path):
    run = Run(tmp_path / "r", SPEC)
    run.begin({})
    run.append(sample(0))
    assert parse((tmp_path / "r" / "samples.jsonl").read_bytes()) == sample(0)
    run.close()


def test_other_and_same_specs_are_told_apart(tmp_path):
    fill(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"holds another run \(limit is null there, 3 here\)"):
        Run(tmp_path / "r", OTHER, resume=True)
    with pytest.raises(ConfigError, match="not finished of this spec; pass --resume"):
        Run(tmp_path / "r", SPEC)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        Run(tmp_path, SPEC)
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        Run(tmp_path / "thesis.tex", SPEC)
    with pytest.raises(ConfigError, match="cannot be written"):
        Run(tmp_path / "thesis.tex" / "r", SPEC)


def test_a_torn_last_line_is_dropped_and_reported(tmp_path):
    file = fill(tmp_path / "r") / "samples.jsonl"
    intact = file.read_bytes()
    file.write_bytes(intact + intact.splitlines()[0][:40])
    run = Run(tmp_path / "r", SPEC, resume=True)
    assert len(run.samples) == 3
    assert file.read_bytes() != intact, "nothing is written before begin"
    run.begin({})
    run.close()
    assert run.notices == [
        "3 samples are from an earlier session; wall time is the last session's",
        f"{file}: the last line was cut short; dropped 40 bytes",
    ]
    assert file.read_bytes() == intact


def test_answers_of_other_weights_are_not_mixed(tmp_path):
    run = Run(tmp_path / "r", SPEC)
    run.begin({"same": {"weights": "a", "dtype": "float32"}})
    run.append(sample(0))
    run.close()
    with pytest.raises(ConfigError, match="was begun with weights a, here it is b"):
        Run(tmp_path / "r", SPEC, resume=True).begin({"same": {"weights": "b", "dtype": "float32"}})
    again = Run(tmp_path / "r", SPEC, resume=True)
    again.begin({"same": {"weights": "a", "dtype": "float32"}})
    again.close()


@pytest.mark.parametrize("line", [b"{nonsense", b"[]", b"3", b'{"key": "x", "task": "gsm8k"}', b"\xff\xfe"])
def test_a_corrupt_line_is_named(tmp_path, line):
    file = fill(tmp_path / "r") / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    for read in (lambda: Run(tmp_path / "r", SPEC, resume=True), lambda: fluid_eval.load_results(tmp_path / "r")):
        with pytest.raises(ConfigError, match=r"samples\.jsonl, line 2: not a sample"):
            read()


def test_a_broken_spec_is_named(tmp_path):
    fill(tmp_path / "r")
    (tmp_path / "r" / "spec.json").write_text(json.dumps({**SPEC.to_dict(), "tasks": 7}))
    with pytest.raises(ConfigError, match=r"spec\.json: tasks=7 must be a list"):
        Run(tmp_path / "r", SPEC, resume=True)
    (tmp_path / "r" / "spec.json").write_text("{")
    with pytest.raises(ConfigError, match=r"spec\.json: not a JSON object"):
        Run(tmp_path / "r", SPEC, resume=True)
    with pytest.raises(ConfigError, match="no run here"):
        fluid_eval.load_results(tmp_path)


def test_a_changed_line_is_found(tmp_path):
    """A sample says what it said when it was written, or is no sample."""
    file = fill(tmp_path / "r") / "samples.jsonl"
    intact = file.read_bytes()
    at = intact.index(b'"output_ids": [1, 2]') + len('"output_ids": [')
    file.write_bytes(intact[:at] + b"7" + intact[at + 1 :])
    with pytest.raises(
        ConfigError, match=r"line 1: not a sample \(its checksum is another\); without that line, --resume"
    ):
        Run(tmp_path / "r", SPEC, resume=True)


@given(st.binary(min_size=1, max_size=3), st.integers(0, 10_000))
def test_no_damage_passes(piece, place):
    line = encode(sample(1))
    place %= len(line) - 1
    damaged = line[:place] + piece + line[place + len(piece) :]
    if damaged.rstrip(b"\n") != line.rstrip(b"\n"):
        with pytest.raises(ValueError, match=r"."):
            parse(damaged)


def test_one_process_writes_at_a_time(tmp_path):
    first = Run(tmp_path / "r", SPEC)
    first.begin({})
    first.append(sample(0))
    with pytest.raises(ConfigError, match="another process writes here"):
        Run(tmp_path / "r", SPEC, resume=True).begin({})
    late = Run(tmp_path / "r", SPEC, resume=True)
    first.append(sample(1))
    first.close()
    with pytest.raises(ConfigError, match="another process wrote here just now"):
        late.begin({})
    again = Run(tmp_path / "r", SPEC, resume=True)
    again.begin({})
    again.append(sample(2))
    assert [again.samples[key]["doc_id"] for key in again.samples] == [0, 1, 2]
    again.close()


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", SPEC)
    run.begin({})
    run.append(sample(0))

    class Full:
        """Takes half a line, then nothing."""

        def __init__(self, file):
            self.file, self.room = file, 50

        def write(self, line):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written, self.room = self.file.write(line[: self.room]), 0
            return written

        def close(self):
            self.file.close()

    monkeypatch.setattr(run, "_file", Full(run._file))
    with pytest.raises(RunError, match=r"samples.jsonl: No space left on device; finished samples are stored"):
        run.append(sample(1))
    run.close()
    again = Run(tmp_path / "r", SPEC, resume=True)
    assert list(again.samples) == ["gsm8k/0"]
    again.begin({})
    again.append(sample(1))
    again.close()
    assert [record["doc_id"] for record in read_samples(tmp_path / "r")] == [0, 1]


def test_what_was_given_up_counts_nowhere_and_is_tried_again(tmp_path):
    lost = {**sample(1), "lost": "its worker died", "scores": {}}
    run = Run(tmp_path / "r", SPEC)
    run.begin({})
    run.append(sample(0))
    run.append(lost)
    assert run.samples["gsm8k/1"]["lost"], "here it is known"
    run.close()
    (line,) = table_rows("gsm8k", [{**record, "truncated": 0} for record in read_samples(tmp_path / "r")])
    assert (line.n, line.score, line.cost.forwards) == (1, 0.0, 4)
    again = Run(tmp_path / "r", SPEC, resume=True)
    assert list(again.samples) == ["gsm8k/0"]
