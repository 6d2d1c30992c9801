"""An outside parent through the whole chain: stories260K, weights nobody here trained, on real TinyStories."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest

import fluid_model
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.checkpoints.manifest import TRAINING_FILE


def tokens_per_forward(answers) -> float:
    forwards = sum(sum(answer.trace.forwards.values()) for answer in answers)
    return sum(len(answer.ids) for answer in answers) / forwards


@pytest.mark.chain
def test_stories260k_comes_to_draft_its_own_text(stories, data_dir, tmp_path):
    """More than 1.5 tokens a forward on stories it has not seen, the text that of AR with the same weights."""
    with gzip.open(data_dir / "tinystories" / "train_sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        every = lines.readlines()
    known, unseen = every[:-24], every[-24:]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(known), encoding="utf-8")
    words = [sys.executable, "-m", "fluid_model.train.cli", str(resource("recipes") / "stories-fluid.toml")]
    for setting in (f"model.parent={stories}", f'data.files=["{rows}"]', f"out={tmp_path / 'stories'}"):
        words += ["--set", setting]
    threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(words, cwd=resource("recipes").parent, env=threads, check=True)
    training = json.loads((tmp_path / "stories" / TRAINING_FILE).read_text(encoding="utf-8"))
    losses = [entry["l_diff"] for entry in training["before"][0]["history"] if "l_diff" in entry]
    assert losses[-1] < losses[0]
    checkpoint = fluid_model.load(str(tmp_path / "stories"))
    openings = [json.loads(line)["text"][:80] for line in unseen]
    work = [Request(text, tuple(checkpoint.tokenizer(text)["input_ids"]), 96) for text in openings]
    ar, fluid = (
        {answer.key: answer for answer in fluid_model.engine_for(checkpoint, decoder).generate(work)}
        for decoder in (ArSettings(), FluidSettings(slot_budget=100_000))
    )
    assert {key: answer.text for key, answer in fluid.items()} == {key: answer.text for key, answer in ar.items()}
    assert tokens_per_forward(ar.values()) <= 1
    assert tokens_per_forward(fluid.values()) > 1.5
