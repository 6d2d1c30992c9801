"""K-head diagnostics: teacher forcing agrees with decoding, and simulated policies cost what they must."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fluid_model
from fluid_eval.analysis.acceptance import ALL, acceptance_by_task
from fluid_eval.analysis.khead import (
    KHEAD,
    ORACLE,
    TextStrides,
    measure_text,
    policies,
    simulate,
    simulate_steps,
    tables_by_task,
)
from fluid_eval.analysis.reopen import StoredText
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_model import ArSettings, FluidSettings, Request, engine_for
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import draft_policy, fluid
from fluid_model.decoders.draft_rows import DraftRows
from fluid_model.train.losses import best_stride
from fluid_model.train.row_layouts import AllMaskLayout, Example
from fluid_model.train.stages import HorizonCalibration, collate

from .test_audit import QUESTIONS

WIDE, BUDGET = 8, 64


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32", tau=1.0)


@pytest.fixture(scope="module")
def texts(checkpoint) -> list[StoredText]:
    prompts = [*(f"Question: {text}\nAnswer:" for text in QUESTIONS), "Problem:\nCompute $19-16$.\n\nSolution:"]
    ids = [tuple(checkpoint.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    work = [Request(str(n), prompt, 60) for n, prompt in enumerate(ids)]
    answers = engine_for(checkpoint, ArSettings(), 8).generate(work)
    return [StoredText(a.key, "t", ids[int(a.key)], a.ids, a.finish == "eos", 0) for a in answers]


def test_rounds_played_are_rounds_made(checkpoint, texts, monkeypatch):
    """Where slots cost nothing and every token has a mask block, the engine makes the same steps, stride by stride."""
    monkeypatch.setattr(draft_policy.StepStatistics, "marginal_costs", lambda each, rows, *_: 0 * each.steps[rows])
    monkeypatch.setattr(fluid, "open_drafts", lambda rows, limits, **_: DraftRows(rows, limits))  # the rule is Python's
    for module in (fluid, draft_policy):
        monkeypatch.setattr(module, "mask_blocks", lambda stops, rate, cost, max_masks, _: [max_masks] * len(stops))
    work = [Request(t.key, t.prompt, len(t.ids) + t.ended) for t in texts]
    made = {
        a.key: a.trace for a in engine_for(checkpoint, FluidSettings(slot_budget=1000, candidates=1), 3).generate(work)
    }
    drafted = accepted = 0
    seen = [measure_text(checkpoint, text, None) for text in texts]
    assert max(most for places in seen for most in places.possible) == 16, "as far as a stride goes"
    for text, places in zip(texts, seen, strict=True):
        played = simulate_steps(places, policies(16)[KHEAD])
        trace = made[text.key]
        assert [stride for stride, _ in played] == trace.predicted
        assert sum(trace.forwards.values()) == 1 + len(played)
        assert [n for _, n in played[:-1]] == trace.accepted[: len(played) - 1]
        drafted, accepted = drafted + sum(s > 1 for s, _ in played), accepted + sum(n > 1 for _, n in played)
    assert drafted > accepted > 10, "or nothing was tested"


def test_what_is_read_off_is_what_training_sees(checkpoint, texts):
    """K* of the cached fans is that of the training layout's own forward."""
    text = max(texts, key=lambda t: len(t.ids))
    tau = 1.0
    ids = (*text.prompt, *text.ids)
    example = Example(ids, ((len(text.prompt), len(ids)),))
    row = AllMaskLayout(checkpoint.mask_id, 16, 1.0).build(example, random.Random(0), 0)
    horizons = HorizonCalibration(checkpoint.model, 16, [tau])
    _, losses, valid = horizons.block_losses(collate([row]))
    measured = measure_text(checkpoint, replace(text, ended=False), tau)
    expected = best_stride(losses, valid, torch.tensor([tau]))[0].tolist()
    assert measured.best[: len(expected)] == expected
    assert len(set(expected)) > 2
    assert len(measured.best) == len(expected) + 1, "no mask behind the last token but one has a token to say"
    assert measured.remaining == list(range(len(text.ids), 0, -1))


PLACES = st.lists(st.tuples(st.integers(1, WIDE), st.integers(1, WIDE)), min_size=1, max_size=60).map(
    lambda pairs: TextStrides(
        [p for p, _ in pairs],
        [min(most, len(pairs) - at) for at, (_, most) in enumerate(pairs)],
        None,
        list(range(len(pairs), 0, -1)),
    )
)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(PLACES, min_size=1, max_size=4))
def test_laws_of_policies(texts):
    every = policies(WIDE)
    for text in texts:
        for rule in every.values():
            measured = simulate_steps(text, rule)
            accepted = sum(n for _, n in measured)
            assert len(text.remaining) - 1 <= accepted < len(text.remaining) - 1 + WIDE
            assert all(1 <= n <= stride for stride, n in measured)
    played = {name: simulate(name, rule, texts, BUDGET) for name, rule in every.items()}
    forwards = {name: each["forwards_per_token"] for name, each in played.items()}
    assert forwards["fixed 1"] == 1
    assert forwards[ORACLE] == forwards[f"fixed {WIDE}"], "the widest draft keeps all that is right"
    assert played[ORACLE]["cost_per_token"] <= played[f"fixed {WIDE}"]["cost_per_token"]
    (table,) = [t for name, t in tables_by_task([("a", each) for each in texts], WIDE, BUDGET).items() if name == ALL]
    places = sum(len(text.remaining) for text in texts)
    assert sum(map(sum, table["joint"])) == table["positions"] == places
    assert sum(row["n"] for row in table["calibration"]) == places
    shares = [step["accepted"] for step in table["by_step"]]
    assert shares[0] == 1
    best = min(played[f"fixed {k}"]["cost_per_token"] for k in range(1, WIDE + 1))
    assert table["regret"] == pytest.approx(played[KHEAD]["cost_per_token"] / best - 1)


def test_a_text_by_hand():
    """Ten tokens to come; drafts of four are right at even places, none at odd ones."""
    text = TextStrides([2] * 10, [4, 1] * 3 + [4, 1, 2, 1], None, list(range(10, 0, -1)))
    assert simulate_steps(text, policies(4)["fixed 4"]) == [(4, 4), (4, 4), (4, 2)]
    assert simulate_steps(text, policies(4)[KHEAD]) == [(2, 2), (2, 2), (2, 2), (2, 2), (2, 2)]
    assert simulate_steps(text, policies(4)["fixed 3"]) == [(3, 3), (3, 1), (3, 3), (3, 1), (3, 2)]
    assert simulate("x", policies(4)["fixed 4"], [text], 10) == {
        "name": "x", "forwards_per_token": 0.4, "slots_per_token": 2.1, "cost_per_token": pytest.approx(0.61),
    }  # fmt: skip


def test_strides_of_samples():
    def sample(task, predicted, accepted):
        return {"task": task, "trace": {"predicted": predicted, "accepted": accepted}}

    records = [sample("a", [3, 2, 4], [1, 2]), sample("b", [2], [0]), sample("a", [1], [1]), {"task": "c", "trace": {}}]
    measured = acceptance_by_task(records)
    assert set(measured) == {"a", "b", ALL}
    assert measured["a"]["rounds"] == 3
    assert measured["a"]["predicted"] == [1, 1, 1]
    assert measured["a"]["accepted"] == [0, 2, 1, 0]
    assert measured[ALL]["joint"] == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert measured["a"]["by_round"] == [
        {"round": 1, "n": 2, "accepted": 1.0},
        {"round": 2, "n": 1, "accepted": 2.0},
    ]
    assert acceptance_by_task([{"task": "c", "trace": {}}]) == {}


def test_the_command_on_a_stored_run(tiny_fluid, tmp_path, capsys):
    run = ["--model", str(tiny_fluid), "--decoder", "fluid", "--tasks", "mini_gsm8k_1", "--limit", "2"]
    run += ["--max-new-tokens", "12", "--set", "decoder.slot_budget=100", "--out", str(tmp_path / "run")]
    assert main(["khead", *run]) == 0
    out = capsys.readouterr().out
    assert "K-head of tau 2.8, K_max 8, slot budget 100\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    measured = json.loads((tmp_path / "run" / "khead.json").read_text())
    assert measured["k_max"] == 8
    assert set(measured["tasks"]) == {"mini_gsm8k_1", ALL}
    assert measured["positions"] == measured["tasks"][ALL]["positions"] == 24
    loose = [*run[:-1], str(tmp_path / "loose"), "--set", "decoder.verify=false"]
    assert main(["khead", *loose]) == 2
    assert "not greedy AR's" in capsys.readouterr().err
