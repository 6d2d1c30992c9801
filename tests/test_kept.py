"""Folders written by earlier versions still open: one run folder and one checkpoint of each stored format.

`tests/kept/run-format-1` is `fluid-eval run --tasks mini_math --limit 4` of the bundled checkpoint.
`tests/kept/checkpoint-format-1` is a random one-layer FLUID checkpoint, saved by `fluid_model.save`. Neither is ever
written again: a change that needs other files has broken the format. Rows of training layouts are kept as a hash.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

import fluid_eval
import fluid_model
from fluid_eval.analysis.compare import compare, worse
from fluid_eval.analysis.rescore import rescore
from fluid_eval.output.report import write_report
from fluid_eval.results.run_folder import Run, held_spec, read_samples
from fluid_eval.running.job import run
from fluid_model.train.masked_layouts import CanvasLayout
from fluid_model.train.row_layouts import AllMaskLayout, Example, HybridLayout, NoisedBlockLayout

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "tests" / "kept" / "run-format-1"
CHECKPOINT = ROOT / "tests" / "kept" / "checkpoint-format-1"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the kept run, whose model path is relative to the checkout."""
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_its_samples_and_spec_are_read(kept):
    frame = fluid_eval.load_results(kept)
    assert len(frame) == 12
    assert frame["score:exact_match,none"].sum() == 9
    assert frame["forwards:round"].sum() == 247
    assert held_spec(kept).id == result_of(kept)["spec_id"] == json.loads((kept / "spec.json").read_text())["id"]


def test_a_finished_run_is_not_run_again(kept, monkeypatch):
    monkeypatch.setattr("fluid_eval.running.job.open_pool", None)  # calling it fails
    assert run(held_spec(kept), kept, resume=True) == result_of(RUN)


def test_it_equals_itself(kept):
    comparison = compare([kept, RUN])
    assert comparison["protocol_difference"] == worse(comparison, 0.0) == []
    (pair,) = comparison["pairs"]
    (task,) = pair["tasks"]
    assert (task["n"], task["difference"]["mean"], task["flips"]) == (12, 0.0, {"gained": [], "lost": []})


def test_its_report_is_written(kept):
    write_report([kept], kept / "report.html")
    assert "75.0" in (kept / "report.html").read_text(encoding="utf-8")


def test_it_is_scored_again_without_a_model(kept, monkeypatch):
    monkeypatch.setattr("fluid_eval.running.job.open_pool", None)
    again, folder = rescore(kept, "lm-eval", kept.with_name("again"))
    before = result_of(RUN)
    for name in ("lines", "parts", "members", "protocol", "health", "spec_id"):
        assert again[name] == before[name], name
    assert (folder / "samples.jsonl").read_bytes() == (RUN / "samples.jsonl").read_bytes()


def test_a_run_broken_off_goes_on(kept):
    """Three of its samples are missing and the last line is torn; libraries may be others by now, and so are dropped
    from what must be the same.
    """
    (kept / "result.json").unlink()
    lines = (kept / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (kept / "samples.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:50])
    environment = json.loads((kept / "environment.json").read_text())
    environment["same"] = {name: environment["same"][name] for name in ("weights", "task versions")}
    (kept / "environment.json").write_text(json.dumps(environment))
    assert len(Run(kept, held_spec(kept), resume=True).samples) == 9
    result = run(held_spec(kept), kept, resume=True)
    texts = [[record["output"] for record in read_samples(folder)] for folder in (kept, RUN)]
    assert texts[0] == texts[1]
    assert [line["score"] for line in result["lines"]] == [line["score"] for line in result_of(RUN)["lines"]]


def test_the_kept_checkpoint_loads_and_writes():
    checkpoint = fluid_model.load(str(CHECKPOINT))
    assert (checkpoint.manifest.format_version, checkpoint.manifest.k_max, checkpoint.manifest.tau) == (2, 4, (2.8,))
    request = fluid_model.Request("1", (0, 5, 9, 30), max_new_tokens=3)
    for settings in (fluid_model.ArSettings(), fluid_model.FluidSettings(slot_budget=8)):
        (answer,) = fluid_model.engine_for(checkpoint, settings).generate([request])
        assert list(answer.ids) == [129, 165, 204], settings.name


def test_the_draws_of_a_seed_are_kept():
    """Rows of every layout, by seed: what the bundled checkpoints were trained on, so that they can be made again."""
    layouts = (
        HybridLayout(1, 8, range(5, 90)), HybridLayout(1, 16, range(5, 90), 0.3, 0.2, 0.6), AllMaskLayout(1, 8),
        AllMaskLayout(1, 8, 0.7, past_end=True), NoisedBlockLayout(1, 2, 8, 1, 3), CanvasLayout(1, 2, 40),
    )  # fmt: skip
    digest, chance = hashlib.sha256(), random.Random(5)
    for step in range(50):
        length = chance.randint(8, 60)
        ids, start = tuple(chance.randrange(5, 200) for _ in range(length)), chance.randint(1, length - 4)
        for layout in layouts:
            row = layout.build(Example(ids, ((start, length),)), random.Random(step), step)
            digest.update(json.dumps([[float(value) for value in values] for values in lists_of(row)]).encode())
    assert digest.hexdigest() == "62a8dfe7116b29de13269ac2b198eaaab2644f0b03e7b61de8bb4136db601c27"


def lists_of(row):
    """A row's lists, in a fixed order."""
    names = ("ids", "positions", "labels", "segment", "anchor", "step", "ar_weight", "diff_weight")
    return [*(getattr(row, name) for name in names), [row.diff_count]]
