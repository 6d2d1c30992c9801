"""The device bench runs where there is no device, needs no more than it says, and replays what was recorded."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from itertools import takewhile

import pytest
import torch

import fluid_model
from bench import replay
from bench.gpu import __main__ as gpu
from bench.gpu.decode import BOUNDS
from bench.gpu.plan import GpuPlan, Measurements
from bench.prompts import mini
from fluid_model import ConfigError, Engine, FluidSettings, Request

QUICK = ["--quick", "--device", "cpu", "--concurrency", "1,2", "--context", "40", "--tokens", "6"]
OURS, HIDDEN = {"bench", "fluid_model"}, {"fluid_eval", "lm_eval", "ray", "pandas"}


@pytest.fixture(scope="module")
def checkpoint():
    return fluid_model.load(str(replay.ROOT / "checkpoints" / "tiny-fluid"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def work(checkpoint):
    ids = [tuple(checkpoint.tokenizer(prompt)["input_ids"]) for prompt in mini(6)]
    return [Request(str(n), prompt, replay.NEW, seed=n) for n, prompt in enumerate(ids)]


@pytest.fixture(scope="module")
def recorded(checkpoint, work):
    return replay.record(checkpoint, work)


@pytest.mark.slow
def test_all_of_it_runs_and_is_told_as_json(capsys):
    assert gpu.main([*QUICK, "--json"]) == 0
    bars = json.loads(capsys.readouterr().out)["bars"]
    measured = {bar["name"]: bar["measured"] for bar in bars}
    assert len(measured) == len(bars)
    assert all(set(bar) == {"name", "measured", "bar", "ok"} and bar["ok"] is None for bar in bars), "no bars for CPUs"
    assert all(name.endswith(", cpu") for name in measured)
    for what in ("AR forward / floor", "FLUID forward / AR forward, 64 slots a row", "tokens a row and round, ours"):
        for rows in (1, 2):
            assert measured[f"{what}, batch {rows}, cpu"] > 0
    assert measured["peak memory, ours / weights + KV, batch 1, cpu"] is None, "nobody counts a CPU's memory here"


def test_the_table_is_one(capsys):
    measurements = Measurements(GpuPlan(torch.device("cpu"), (1, 8)), BOUNDS)
    measurements.put("slot budget", 0, 96)
    measurements.put("AR forward / floor", 8, 1.23456)
    measurements.put("peak memory, ours / weights + KV", 1, None)
    assert measurements.table().splitlines() == [
        "| cpu | batch 1 | batch 8 |",
        "| --- | --- | --- |",
        "| slot budget | 96 |  |",
        "| AR forward / floor |  | 1.235 |",
        "| peak memory, ours / weights + KV | not measured |  |",
    ]


def test_bars_are_for_the_whole_model_on_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A device")
    measurements = Measurements(GpuPlan(torch.device("cuda"), (1, 64)), BOUNDS)
    measurements.put("tokens/s, ours / AR", 1, 2.2)
    measurements.put("tokens/s, ours / AR", 64, 1.34)
    measurements.put("AR forward, ms", 1, 4.0)
    assert [bar.ok for bar in measurements.bars] == [False, True, None]
    assert "| 2.2 (at least 2.3: **no**) | 1.34 (at least 1.34: yes) |" in measurements.table()
    small = Measurements(GpuPlan(torch.device("cuda"), (1,), layers=2), BOUNDS)
    small.put("tokens/s, ours / AR", 1, 2.2)
    assert small.bars[0].ok is None


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "slots"), [(256, 1), (30, 1), (256, 4)])
def test_replayed_rounds_are_those_of_the_recorded_model(checkpoint, work, recorded, budget, slots):
    settings = FluidSettings(slot_budget=budget)
    real = {g.key: g for g in fluid_model.engine_for(checkpoint, settings, slots).generate(work)}
    tape = replay.Tape.of(recorded, 1000)
    assert len(tape.starts) == len(work)
    asked = [Request(r.key, r.prompt, len(real[r.key].ids) + 1, seed=r.seed) for r in work]  # and an end
    again = Engine(checkpoint.backbone, checkpoint.tokenizer, (), replay.Replay(checkpoint, settings, tape), slots)
    for answer in again.generate(asked):
        trace, begin = real[answer.key].trace, tape.starts[int(answer.key)]
        assert answer.ids == tuple((begin + 1 + n) % len(tape.blocks) for n in range(len(answer.ids))), (
            "tokens in order"
        )
        assert answer.trace.predicted == trace.predicted
        assert answer.trace.accepted[:-1] == trace.accepted[:-1]
        assert answer.trace.slots == trace.slots


def test_the_file_is_tiny_fluids_and_small(recorded):
    recording = json.loads(replay.FILE.read_text())
    assert replay.FILE.stat().st_size < 120_000
    assert set(recording) == {"model", "prompts", "answers"}
    assert len(recording["answers"]) == 60
    tape = replay.read(10**6)
    assert len(tape.starts) == 60
    for begin, fans in zip(tape.starts, recorded, strict=False):
        kept = tape.blocks[begin : begin + len(fans)]
        assert [_accepted(fan) for fan in kept] == [_accepted(fan) for fan in fans], (
            "record it anew: bench.gpu --record"
        )


def _accepted(fan):
    return len(list(takewhile(lambda siblings: siblings[0] > 0, fan)))


def test_letters_keep_how_likely_drafts_are(recorded):
    for fan in recorded[0]:
        again = replay.sureness(replay.letters(fan))
        assert [[probability > 0 for probability in siblings] for siblings in again] == [
            [probability > 0 for probability in siblings] for siblings in fan
        ]
        for n, siblings in enumerate(fan):
            for rank in range(len(siblings)):
                reach, kept = (abs(math.prod(each[0] for each in some[:n]) * some[n][rank]) for some in (fan, again))
                assert kept == pytest.approx(reach, rel=0.15)


@pytest.mark.parametrize("text", ["", "{}", '{"answers": ["BA"]}', '{"answers": ["A?"]}', '{"answers": []}'])
def test_a_file_that_is_no_recording_is_refused(tmp_path, text):
    (tmp_path / "accepted.json").write_text(text)
    with pytest.raises(ConfigError, match=r"not a recording|no recorded answer"):
        replay.read(1000, tmp_path / "accepted.json")


def test_a_tape_holds_whole_answers_and_goes_round():
    tape = replay.Tape.of([[((0.5, -0.2),), ()], [((-0.4,),), (), ()], [()]], most=5)
    assert (tape.starts, tape.wrong) == ((0, 2), 5)
    assert tape.drafts[0] == [[(2, 0.5), (5, 0.2)]]
    assert tape.drafts[2] == [[(5, 0.4)]]
    assert (tape.after(4), tape.after(5)) == (0, 5)
    assert len(tape.drafts) == 6


def test_what_cannot_be_replayed_or_measured_is_refused(checkpoint, recorded, capsys):
    with pytest.raises(ConfigError, match="greedy"):
        replay.Replay(checkpoint, FluidSettings(verify=False), replay.Tape.of(recorded, 1000))
    for words in (["--hidden", "100"], ["--tokens", "1"], ["--concurrency", "0"], ["--device", "nowhere"]):
        with pytest.raises(SystemExit):
            gpu.main(words)
    assert "nowhere" in capsys.readouterr().err


class Without:
    """A finder of modules that does not know the hidden ones."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *words):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *words)


def helped_without(file) -> int:
    """Exit code of the bench's --help, imported anew where the hidden packages are not; what it says in that file."""
    for name in [name for name in sys.modules if name.split(".")[0] in OURS | HIDDEN]:
        del sys.modules[name]
    sys.meta_path[:] = map(Without, sys.meta_path)
    with file.open("w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            assert not any(map(importlib.util.find_spec, HIDDEN))
            importlib.import_module("bench.replay").read(10_000)
            importlib.import_module("bench.gpu.__main__").main(["--help"])
        except SystemExit as ended:
            return int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
    return 1


def test_no_more_than_the_model_package_is_needed(tmp_path):
    """In a fork, which has torch and transformers already."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(helped_without(tmp_path / "told"))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output = (tmp_path / "told").read_text()
    assert code == 0, output
    assert "usage: python -m bench.gpu" in output


@pytest.mark.gpu
def test_all_of_it_runs_on_a_device(capsys):
    assert gpu.main(["--quick", "--device", "cuda", "--json"]) == 0
    bars = json.loads(capsys.readouterr().out)["bars"]
    assert next(bar["measured"] for bar in bars if bar["name"].startswith("peak memory")) >= 1
