"""An outside parent through the whole chain: stories260K, weights nobody here trained, on real TinyStories."""

from __future__ import annotations

import pytest

import fluid_model
from fluid_eval.paths import resource
from fluid_model import ArSettings, FluidSettings, Request
from fluid_model.fields import assign, read_toml
from fluid_model.train.recipe import build_chain
from fluid_model.train.run import train_chain

OPENINGS = (
    "Once upon a time, there was a little girl named Lily. She",
    "Tom and his dog went to the park. They",
    "One day, a bird saw a big red ball. The bird",
    "Ben was sad. He",
    "The sun was hot and the cat",
    'Mia said, "Mom, can we',
)


@pytest.mark.chain
def test_stories260k_comes_to_draft_its_own_text(stories, data_dir, tmp_path):
    """More than 1.5 tokens a forward, and greedy text stays that of the adapted model read one token a forward."""
    values = read_toml(resource("recipes") / "stories-fluid.toml")
    rows = data_dir / "tinystories" / "train_sample.jsonl.gz"
    for setting in (f"model.parent={stories}", f'data.files=["{rows}"]', f"out={tmp_path / 'stories'}"):
        assign(values, setting)
    told = train_chain(build_chain(values))
    losses = [entry["l_diff"] for entry in told["before"][0]["history"] if "l_diff" in entry]
    assert losses[-1] < losses[0]
    checkpoint = fluid_model.load(str(tmp_path / "stories"))
    work = [Request(text, tuple(checkpoint.tokenizer(text)["input_ids"]), 96) for text in OPENINGS]
    ar, fluid = (
        {g.key: g for g in fluid_model.engine_for(checkpoint, decoder).generate(work)}
        for decoder in (ArSettings(), FluidSettings())
    )
    assert {key: g.text for key, g in fluid.items()} == {key: g.text for key, g in ar.items()}
    per_forward = [
        sum(len(g.ids) for g in found.values()) / sum(sum(g.trace.forwards.values()) for g in found.values())
        for found in (ar, fluid)
    ]
    assert per_forward[0] <= 1
    assert per_forward[1] > 1.5
