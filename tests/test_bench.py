"""Benches run, and tell their bars in the form all of them share."""

from __future__ import annotations

import json

import pytest

import fluid_eval
from bench import bars, decode, likelihood, scale, smol
from bench.prompts import mini
from fluid_model import Generation
from fluid_model.engine.records import Trace

from .test_gated import gated_checkpoint
from .tiny import fluid_checkpoint


def test_bars_are_told_in_two_forms():
    results = [bars.at_least("speed", 2.4999, 2.5), bars.at_most("waste", 0.1, 0.1), bars.Bar("shown", 3.0, "", None)]
    printed = json.loads(bars.render(results, as_json=True))["bars"]
    assert printed[0] == {"name": "speed", "measured": 2.5, "bar": "at least 2.5", "ok": False}
    assert [bar["ok"] for bar in printed] == [False, True, None]
    assert "| speed | 2.5 | at least 2.5 | **no** |" in bars.render(results, as_json=False)


def test_prompts_are_the_test_sets_levels_in_turn():
    prompts = mini(6)
    assert len(set(prompts)) == 6
    assert all(prompt.startswith("Question: ") and prompt.endswith("Answer:") for prompt in prompts)


@pytest.mark.slow
def test_decoding_is_measured(capsys):
    """Texts must be AR's; what is fast enough is not for a test of one run to say."""
    decode.main(["--quick", "--json", "--only", "identical", "--only", "forwards", "--only", "overhead"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["bars"]
    texts = [bar for bar in printed if bar["name"].startswith("greedy text identical")]
    assert len(texts) == 2
    assert all(bar["ok"] for bar in texts)
    assert next(bar["measured"] for bar in printed if bar["name"].endswith("slots free")) > 1.5
    assert all(0 < bar["measured"] < 1 for bar in printed if bar["name"].startswith("engine overhead"))


@pytest.mark.slow
def test_likelihoods_are_measured(capsys, data_dir):
    likelihood.main(["--quick", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["bars"]
    assert printed[0]["measured"] > 0
    assert printed[1]["ok"], "log-likelihoods are those of lm-eval's backend"


def test_a_gated_training_is_measured():
    """On random weights: the step runs forward and backward, and its share of a product's rate is a share."""
    child, parent = gated_checkpoint(vocabulary=1300, window=400)
    part = smol.training(smol.Pair(parent, child), smol.SmolWorkload(runs=1))
    assert 0 < part.bars[0].measured < 2
    assert "mask slots/s" in part.table


def test_steps_that_reach_a_depth():
    trace = Trace(accepted=[1, 3, 2, 1])
    answer = Generation("0", (5,) * 7, "", "eos", trace, 1.0)
    child = fluid_checkpoint(k_max=3)
    assert smol.reached({"0": answer}, child) == ["100%", "50%", "25%", "0%"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        decode.main(["--only", "everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_dummy_samples_cost_little(tmp_path):
    """The driver and the store alone; what Ray adds is for the bench."""
    spec, work = scale.dummy(500, 2)
    seconds, _ = scale.store_all(scale.InProcess(), spec, work, tmp_path / "r")
    assert seconds < 1e-3
    assert len(fluid_eval.load_results(tmp_path / "r")) == 500
