"""Whether to draft: the choice costs little where drafts do not pay, and changes no text."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.common.paths import resource
from fluid_model import ArSettings, Checkpoint, FluidSettings, Request, engine_for, load
from fluid_model.decoders import drafting_rates, fluid
from fluid_model.decoders.draft_policy import MAX_COST, MIN_COST, StepStatistics
from fluid_model.decoders.drafting_rates import LONGEST_WAIT, DraftingRates, Rate, RowRates
from fluid_model.forward.forward_time import ForwardTime

from .test_rounds import requests


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load(str(resource("checkpoints") / "tiny-fluid"))


def simulate(rates: DraftingRates, rows: int, steps: int, speedup: float, seed: int = 0) -> tuple[float, float, int]:
    """Tokens and seconds where a plain step takes a second, a draft of one token is accepted half of the time, and
    drafting writes `speedup` times as fast. Third: steps that drafted.
    """
    noise, tokens, seconds, drafted = random.Random(seed), 0, 0.0, 0
    for _ in range(steps):
        drafts = rates.of(rows, 0).drafts
        written = rows + (sum(noise.random() < 0.5 for _ in range(rows)) if drafts else 0)
        took = (1.5 / speedup if drafts else 1.0) * noise.uniform(0.9, 1.2)
        rates.of(rows, 0).add(took, written / rows)
        tokens, seconds, drafted = tokens + written, seconds + took, drafted + drafts
    return tokens, seconds / 1.05, drafted


@settings(max_examples=40, deadline=None)
@given(rows=st.sampled_from([1, 2, 4, 8, 32, 64]), speedup=st.floats(0.2, 3.0), seed=st.integers(0, 9))
def test_little_is_lost_against_either_kind_of_step(rows, speedup, seed):
    tokens, seconds, _ = simulate(DraftingRates(), rows, 6000, speedup, seed)
    assert tokens / seconds >= 0.97 * rows * max(1.0, 0.95 * speedup)


def test_a_change_is_noticed():
    """Of the text, say: drafts are accepted from now on, or no longer."""
    rates = DraftingRates()
    simulate(rates, 4, 5000, 0.5)
    assert not rates.of(4, 0).drafts
    _, _, drafted = simulate(rates, 4, 3 * LONGEST_WAIT, 2.0)
    assert drafted > LONGEST_WAIT
    _, _, drafted = simulate(rates, 4, 5 * LONGEST_WAIT, 0.5)
    assert drafted < 2 * LONGEST_WAIT


def test_numbers_of_rows_have_rates_of_their_own():
    rates = DraftingRates()
    simulate(rates, 1, 1000, 2.0)
    simulate(rates, 64, 1000, 0.5)
    assert [rates.of(rows, 0).drafts for rows in (1, 64, 33)] == [True, False, False]
    assert [rates.of(rows, 0).drafts for rows in (2, 20)] == [True, False], "new ones begin with a neighbour's choice"
    assert rates.of(3, 0) is rates.of(4, 0) is not rates.of(5, 0)


def test_lengths_have_rates_of_their_own():
    """What short prompts have decided holds for twice the length until it is tried, and for no more than that."""
    rates = DraftingRates()
    simulate(rates, 1, 1000, 0.5)
    assert rates.of(1, 511.9) is rates.of(1, 0) is not rates.of(1, 512)
    assert rates.of(1, 2000) is rates.of(1, 1024) is not rates.of(1, 2048)
    assert [rates.of(1, context).drafts for context in (0, 512, 1024, 4096)] == [False, False, True, True]
    assert [rates.of(1, context).trying > 0 for context in (0, 512, 1024, 4096)] == [False, False, True, True]
    assert rates.of(2, 512).trying, "its neighbours have decided nothing yet"


def test_a_rate_is_of_one_row(checkpoint, monkeypatch):
    """The cost of a slot multiplies it by the rows. Three or four together bring three tokens a step at least."""
    brought, add = list[float](), RowRates.add

    def recorded(rates: RowRates, seconds: float, tokens: float) -> None:
        if rates.rows > 2:
            brought.append(tokens)
        add(rates, seconds, tokens)

    monkeypatch.setattr(RowRates, "add", recorded)
    drafting_rates._RATES.clear()
    list(engine_for(checkpoint, FluidSettings(), 4).generate(requests(checkpoint)))
    drafting_rates._RATES.clear()
    assert 1 <= min(brought) < 3


def test_an_outlier_counts_little():
    rate = Rate()
    assert rate.value is None
    for _ in range(9):
        rate.add(1.0, 2.0)
    rate.add(1000.0, 2.0)
    assert rate.value == pytest.approx(20 / 12)


class Alternating(RowRates):
    """Another kind of step every few, whatever they bring."""

    def __init__(self, every: int) -> None:
        self._kinds = itertools.cycle([True] * every + [False] * every)
        super().__init__(1)

    @property
    def drafts(self) -> bool:
        return next(self._kinds)

    @drafts.setter
    def drafts(self, value: bool) -> None:
        pass

    def add(self, seconds: float, tokens: float) -> None:
        pass

    def decline(self) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_kind_of_step_changes_no_text(checkpoint, monkeypatch, every, batch_size, temperature):
    """Rows are admitted and moved while steps are of either kind."""
    alternating = Alternating(every)
    monkeypatch.setattr(DraftingRates, "of", lambda *_: alternating)
    monkeypatch.setattr(StepStatistics, "timed_cost", lambda *_: 0.02)  # the same drafts on every machine
    drafting_rates._RATES.clear()
    decoder = FluidSettings(temperature=temperature, min_horizon=4)
    # the longest prompt, which is first, ends first: another row moves into its place
    work = [replace(r, max_new_tokens=n) for r, n in zip(requests(checkpoint), (9, 28, 28, 28), strict=True)]
    written = {g.key: g for g in engine_for(checkpoint, decoder, batch_size).generate(work)}
    drafting_rates._RATES.clear()
    expected = engine_for(checkpoint, ArSettings(temperature=temperature), batch_size).generate(work)
    assert {key: g.ids for key, g in written.items()} == {g.key: g.ids for g in expected}
    for generation in written.values():
        trace = generation.trace
        assert len(generation.ids) < 20 or min(trace.forwards["commit"], trace.forwards["round"]) > 4
        assert len(trace.predicted) == trace.forwards["round"] + trace.forwards["commit"]
        assert min(1, len(generation.ids)) + sum(trace.accepted) == len(generation.ids)
    if every > 1:
        assert any(max(g.trace.accepted, default=0) > 1 for g in written.values()), "some drafts are accepted"


def test_drafts_that_would_feed_no_slot_are_not_tried(checkpoint, monkeypatch):
    """Once plain steps are in force and a slot costs more than a draft token can bring."""
    monkeypatch.setattr(StepStatistics, "timed_cost", lambda *_: MAX_COST)
    drafting_rates._RATES.clear()
    rounds = []
    for _ in range(5):
        written = list(engine_for(checkpoint, FluidSettings(), 1).generate(requests(checkpoint)))
        rounds.append(sum(g.trace.forwards["round"] for g in written))
    assert rounds[0] >= drafting_rates.TRIAL_STEPS, "the first choice is made by time"
    assert rounds[1:] == [0] * 4
    rates = drafting_rates.rates_of(checkpoint.backbone, (FluidSettings(), checkpoint.head)).of(1, 0)
    assert rates.wait > drafting_rates.FIRST_WAIT, "trials were due"
    drafting_rates._RATES.clear()


def test_a_slot_costs_what_its_time_would_bring():
    """On a straight line as by the slot budget, nothing where the curve is flat, else by the measured rate."""
    statistics, rows, budget = StepStatistics(3), slice(0, 3), 20
    statistics.steps[:], statistics.committed[:], statistics.fed[:] = 4.0, 10.0, 48.0
    line = ForwardTime([(n, 1 + n / budget) for n in (1, 2, 4, 8, 16, 32, 64, 128)])
    for together in (1, 3):
        expected = statistics.marginal_costs(rows, budget, together)
        assert expected.tolist() == pytest.approx([statistics.timed_cost(rows, line, together, 0, None)] * 3, rel=1e-6)
    assert statistics.timed_cost(rows, line, 1, 0, 2.0) == pytest.approx(2.0 / budget)
    assert statistics.timed_cost(rows, ForwardTime([(1, 1.0), (64, 1.0)]), 1, 0, None) == MIN_COST
    statistics.fed[:] = 20.0, 48.0, 76.0  # the same on average
    assert statistics.timed_cost(rows, line, 3, 0, None) == pytest.approx(expected[0], rel=1e-6)
    longer = ForwardTime(line.points, attention=0.0001)
    assert statistics.timed_cost(rows, longer, 1, 1128, 2.0) == pytest.approx(2.0 * (1 / budget + 0.1))


def test_forwards_are_timed_while_they_run(checkpoint):
    backbone = checkpoint.backbone
    before = backbone.forward_time.points
    list(engine_for(checkpoint, FluidSettings(slot_budget=8), 1).generate(requests(checkpoint)))
    assert backbone.forward_time.points == before, "a budget that is set is not refreshed"
    drafting_rates._RATES.clear()
    list(engine_for(checkpoint, FluidSettings(), 1).generate(requests(checkpoint)))
    assert backbone.forward_time.points != before


def test_what_decided_is_recorded(checkpoint):
    drafting_rates._RATES.clear()
    engine = engine_for(checkpoint, FluidSettings(), 2)
    (record, *_) = [g.draft_policy.to_dict() for _ in range(4) for g in engine.generate(requests(checkpoint)[:2])][-2:]
    assert (record["slot_budget"], record["rows"]) == (None, 2)
    assert min(record["drafting_rate"], record["plain_rate"]) > 0
    assert isinstance(record["drafts"], bool)
    (fixed, *_) = engine_for(checkpoint, FluidSettings(slot_budget=8), 2).generate(requests(checkpoint))
    assert fixed.draft_policy.to_dict() == {"slot_budget": 8, "rows": 2}


def test_rates_are_of_the_length_at_hand(checkpoint, monkeypatch):
    """Prompts of both lengths, and an answer that grows from one to the other."""
    monkeypatch.setattr(drafting_rates, "SHORT_CONTEXT", 64)
    monkeypatch.setattr(fluid, "LOOK_EVERY", 3)  # steps with drafts may be few
    steps, add = list[tuple[int, int]](), RowRates.add

    def counted(rates: RowRates, seconds: float, tokens: float) -> None:
        (place,) = [place for place, known in of_all._known.items() if known is rates]
        steps.append(place)
        add(rates, seconds, tokens)

    monkeypatch.setattr(RowRates, "add", counted)
    drafting_rates._RATES.clear()
    of_all = drafting_rates.rates_of(checkpoint.backbone, (FluidSettings(), checkpoint.head))
    endless = replace(checkpoint, end_ids=())
    for prompt, new in ((10, 20), (130, 20), (10, 150)):
        steps.clear()
        list(engine_for(endless, FluidSettings(), 1).generate([Request("", (5,) * prompt, new)]))
        lengths = [length for _, length in steps]
        assert lengths == sorted(lengths)
        assert set(lengths) == ({0} if prompt + new < 64 else {2} if prompt > 64 else {0, 1, 2})
    steps.clear()
    monkeypatch.setattr(fluid, "LOOK_EVERY", 1000)
    list(engine_for(endless, FluidSettings(), 1).generate([Request(f"{n}", (5,) * n, 20) for n in (130, 10)]))
    assert {length for _, length in steps} == {0, 2}, "one behind the other, in the same row"
    drafting_rates._RATES.clear()
