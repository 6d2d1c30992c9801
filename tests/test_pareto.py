"""Intervals that cover, comparisons that are paired, and a frontier that owes nothing to chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.common.stats import Interval
from fluid_eval.sweeps.pareto import LEAST, SPEEDS, Placed, below, best, frontier, measure
from fluid_eval.sweeps.points import Point, ScoredDocument
from fluid_model.common.errors import ConfigError


def point(name, scores, seconds=1.0, *, tokens=10, forwards=10, task="t", stopped=None, again=(1.0, 1.1, 0.9)):
    """A point that answered documents 0, 1, … of one task in so many seconds each; all timed again in turns that took
    `again` times as long, for all points alike.
    """
    each = [seconds] * len(scores)
    samples = [
        ScoredDocument(task, doc, score, tokens, forwards, s)
        for doc, (score, s) in enumerate(zip(scores, each, strict=True))
    ]  # fmt: skip
    paces = {("s", repeat): tokens / seconds / by for repeat, by in enumerate(again)}
    return Point(name, {}, samples, stopped, paces)


def placed(name, score, speed, **rest):
    """A measured point of which only the means matter."""
    pace = None if speed is None else Interval(speed, speed, speed, 1)
    return Placed(name, {}, 1, Interval(score, score, score, 1), pace, pace, pace, **rest)


def scored(hits, n):
    return [1.0] * hits + [0.0] * (n - hits)


ANSWERS = st.tuples(st.sampled_from([0.0, 1 / 3, 1.0]), st.integers(0, 9), st.integers(1, 9))


@st.composite
def sweeps(draw):
    """2 to 4 points that answered the same documents of two tasks."""
    n = draw(st.integers(LEAST, LEAST + 10))
    rows = draw(st.lists(st.lists(ANSWERS, min_size=n, max_size=n), min_size=2, max_size=4))
    return [
        Point(f"p{i}", {}, [ScoredDocument("ab"[doc % 2], doc, s, t, f, t / f) for doc, (s, t, f) in enumerate(row)])
        for i, row in enumerate(rows)
    ]


def test_intervals_cover():
    rng = np.random.default_rng(0)
    repetitions, covered = 300, dict.fromkeys(("score", *SPEEDS[1:]), 0)
    truth = {"score": 0.55, "tokens_per_forward": 2.0, "forwards_per_answer": 25.0}
    for seed in range(repetitions):
        samples = []
        for task, share, n in (("easy", 0.7, 25), ("hard", 0.4, 40)):
            for doc in range(n):
                forwards = int(rng.integers(10, 41))
                tokens, seconds = round(forwards * rng.uniform(1, 3)), forwards * rng.uniform(0.05, 0.15)
                samples.append(ScoredDocument(task, doc, float(rng.random() < share), tokens, forwards, seconds))
        (placed_point,) = measure([Point("p", {}, samples)], draws=300, seed=seed)
        for name, value in truth.items():
            interval = getattr(placed_point, name)
            assert interval.low <= interval.mean <= interval.high
            covered[name] += interval.low <= value <= interval.high
    assert all(0.92 <= count / repetitions <= 0.98 for count in covered.values()), covered


@pytest.mark.slow
def test_a_loss_is_called_small_for_sure_only_where_it_is():
    """At a true loss of exactly `within`, the lower end of a 95% interval errs in about one of forty cases."""
    rng = np.random.default_rng(1)
    repetitions, wrong = 300, 0
    for seed in range(repetitions):
        luck = rng.random(150)
        sweep = [point("ar", (luck < 0.6) * 1.0), point("fast", ((luck > 0.2) & (luck < 0.7)) * 1.0, 0.5)]
        chosen = best(measure(sweep, draws=1), baseline="ar", within=10, points=sweep, draws=300, seed=seed)
        wrong += chosen.name == "fast"
    assert 0.01 <= wrong / repetitions <= 0.06


@given(sweeps(), st.sampled_from(SPEEDS))
@settings(max_examples=25, deadline=None)
def test_no_point_dominates_itself_its_twin_or_its_dominator(sweep, by):
    twins = [*sweep, *(replace(p, name=f"{p.name} again") for p in sweep)]
    measured = {p.name: p for p in measure(twins, by=by, draws=50)}
    for name, p in measured.items():
        twin = measured[name.removesuffix(" again") if name.endswith("again") else f"{name} again"]
        assert replace(p, name=twin.name) == replace(twin, dominated_by=p.dominated_by)
        assert p.dominated_by not in (name, twin.name)
        if p.dominated_by:
            assert measured[p.dominated_by].dominated_by not in (name, twin.name)
    assert not any(below(p, p, by=by, draws=20, confidence=0.0001) for p in sweep)


@given(sweeps(), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_a_dominated_point_more_changes_nothing_for_the_others(sweep, n):
    alone = measure(sweep, draws=50)
    worse = replace(point("worse", [0.0] * n, 1e6), stopped="time")
    other = replace(worse, name="of other documents", samples=[replace(s, task="a b") for s in worse.samples])
    assert measure([worse, *sweep, other], draws=50)[1:-1] == alone


def test_all_tasks_weigh_the_same():
    few, many = point("", scored(2, 4), task="few").samples, point("", scored(90, 90), task="many").samples
    (placed_point,) = measure([Point("p", {}, [*many, *few])])
    assert placed_point.score.mean == pytest.approx(0.75)
    assert placed_point.n == 94
    (right,) = measure([point("right", [1.0] * 15)])
    assert (right.score.high, right.score.low) == (1, pytest.approx(0.796, abs=1e-3)), "of 15 documents, not of all"


def test_points_answer_the_same_drawn_documents():
    """8 of 100 documents more is sure when nothing is lost, though the intervals overlap; 8 won for 20 lost is not."""
    slow, fast = point("slow", scored(50, 100)), point("fast", scored(58, 100), 0.5)
    lucky = point("lucky", [0.0] * 20 + [1.0] * 58 + [0.0] * 22, 0.5)
    one, other = measure([slow, fast])
    assert one.score.high > other.score.low
    assert (one.dominated_by, other.dominated_by) == ("fast", None)
    assert below(slow, fast)
    assert not below(fast, slow)
    assert measure([slow, lucky])[0].dominated_by is None
    assert not below(slow, lucky)


def test_with_equal_scores_speed_decides():
    """A verified decoder writes what its parent writes: clearly faster dominates, sometimes faster does not."""
    scores = [1 / 3, 0.0, 1.0] * 20
    ar, fluid = point("ar", scores), point("fluid", scores, 0.9)
    wavering = point("wavering", scores, 0.9, again=(0.5, 2.0, 0.9))
    measured = {p.name: p.dominated_by for p in measure([ar, fluid, wavering])}
    assert measured == {"ar": "fluid", "fluid": None, "wavering": None}
    assert not below(ar, fluid), "a point is only stopped by one that scores more"


def test_the_fastest_dominator_is_named():
    sweep = [point(name, scored(30, 60), seconds) for name, seconds in (("c", 0.5), ("a", 0.2), ("b", 1.0), ("d", 0.9))]
    assert [p.dominated_by for p in measure(sweep)] == ["a", None, "a", "a"]


def test_fewer_forwards_an_answer_are_faster():
    many, few = point("many", scored(30, 60), forwards=20), point("few", scored(40, 60), forwards=5)
    measured = measure([many, few], by="forwards_per_answer")
    assert [p.forwards_per_answer.mean for p in measured] == pytest.approx([20, 5])
    assert [p.dominated_by for p in measured] == ["few", None]
    assert measure([many, few])[0].dominated_by is None, "as fast by the clock"
    assert below(many, few, by="forwards_per_answer")
    assert frontier(measured, "forwards_per_answer") == ["few"]
    assert best(measured, within=100, by="forwards_per_answer").name == "few"


def test_speeds_are_those_of_tasks_that_write():
    wrote = [ScoredDocument("gsm8k", 0, 1.0, 30, 10, 2.0), ScoredDocument("gsm8k", 1, 0.0, 0, 5, 1.0)]
    scored_only = [ScoredDocument("mmlu", doc, 1.0, 0, 1, 9.0) for doc in range(5)]
    both, none = measure([Point("both", {}, [*wrote, *scored_only]), Point("none", {}, scored_only)])
    speeds = (both.tokens_per_second, both.tokens_per_forward, both.forwards_per_answer)
    assert [s.mean for s in speeds] == pytest.approx([10, 2, 7.5]), "an empty answer counts with what it cost"
    assert [s.n for s in speeds] == [2, 2, 2]
    assert (none.tokens_per_second, none.tokens_per_forward, none.forwards_per_answer) == (None, None, None)
    assert frontier([none]) == []


def test_a_stopped_point_is_compared_on_common_documents():
    """b scores less than a over all it answered, but more on what a answered too."""
    a = point("a", scored(20, 40), stopped="too slow")
    b = point("b", scored(36, 40) + [0.0] * 160, 0.5)
    measured = {p.name: p for p in measure([a, b])}
    assert measured["a"].score.mean > measured["b"].score.mean
    assert measured["a"].dominated_by == "b"
    assert below(a, b)
    turned = point("b", scored(0, 40) + [1.0] * 160, 0.5)
    assert measure([a, turned])[0].dominated_by is None
    assert not below(a, turned)


def test_a_handful_of_documents_or_a_stopped_point_beats_no_one():
    few, more = LEAST - 1, LEAST
    assert not below(point("a", [0.0] * few), point("b", [1.0] * few, 0.5))
    assert below(point("a", [0.0] * more), point("b", [1.0] * more, 0.5))
    assert measure([point("a", [0.0] * few), point("b", [1.0] * few, 0.5)])[0].dominated_by is None
    stopped = point("b", [1.0] * 50, 0.5, stopped="time")
    measured = measure([point("a", [0.0] * 60), stopped])
    assert measured[0].dominated_by is None
    assert frontier(measured) == ["a"]
    assert best(measured, within=100).name == "a"


def test_frontier_of_means():
    sweep = [
        placed("slow", 0.5, 1.0), placed("ar", 0.8, 2.0), placed("fast", 0.6, 5.0), placed("twin", 0.6, 5.0),
        placed("between", 0.6, 4.0), placed("worst", 0.1, 4.5), placed("silent", 0.9, None),
    ]  # fmt: skip
    assert frontier(sweep) in (["ar", "fast", "twin"], ["ar", "twin", "fast"])


def test_best_by_hand():
    sweep = [placed("ar", 0.70, 1.0), placed("a", 0.69, 2.0), placed("b", 0.65, 3.0), placed("top", 0.71, 0.5)]
    for baseline, within, name in (
        ("ar", 1, "a"),
        ("ar", 0.9, "ar"),
        ("ar", 5, "b"),
        (None, 1, "ar"),
        (None, 0, "top"),
    ):
        assert best(sweep, baseline=baseline, within=within).name == name
    assert best(sweep, baseline="ar", within=-2) is None
    assert best([placed("silent", 0.7, None)], within=1) is None
    assert best([placed("a", 0.7, 1.0, stopped="time")], within=1) is None


def test_best_for_sure_asks_more():
    sweep = [point("ar", scored(70, 100)), point("mixed", [0.0] * 10 + [1.0] * 70 + [0.0] * 20, 0.5)]
    measured = measure(sweep)
    assert best(measured, baseline="ar", within=1).name == "mixed"
    assert best(measured, baseline="ar", within=1, points=sweep).name == "ar", "as many right, but others"
    same = [sweep[0], point("same", scored(70, 100), 0.5)]
    assert best(measure(same), baseline="ar", within=0, points=same).name == "same"


def test_nonsense_is_named():
    a, b = point("a", scored(3, 5)), point("b", scored(3, 5))
    measured = measure([a, b])
    cases = {
        "there is nothing to measure": lambda: measure([]),
        "2 points are named 'a'": lambda: measure([a, a]),
        "'none' has no samples": lambda: measure([a, Point("none", {}, [])]),
        "'a' has two samples of document 0 of t": lambda: measure([replace(a, samples=[*a.samples, a.samples[0]])]),
        "by='speed'": lambda: measure([a], by="speed"),
        "draws=0": lambda: measure([a], draws=0),
        "baseline='c' .*: a, b$": lambda: best(measured, baseline="c", within=1),
        "points lack b": lambda: best(measured, baseline="a", within=1, points=[a]),
        "nothing to choose from": lambda: best([], within=1),
        "score=1.1": lambda: ScoredDocument("t", 0, 1.1, 0, 0, 0.0),
        "score=nan": lambda: ScoredDocument("t", 0, math.nan, 0, 0, 0.0),
        "seconds=-1.0": lambda: ScoredDocument("t", 0, 1.0, 0, 0, -1.0),
    }
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=message):
            call()
