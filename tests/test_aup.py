"""AUP against its authors' published numbers, by hand, and where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluid_eval.sweeps.aup import areas, as_rows, aup
from fluid_eval.sweeps.points import Point, ScoredDocument
from fluid_model.common.errors import ConfigError

# d3LLM's leaderboard (asset/imgs/dllm_leaderboard.png of its repository, commit e5bfcac) and the data behind it
# (AUP_leaderboard/data_llada.yaml, data_dream.yaml): the pairs, the task's best accuracy in that file, published AUP
PUBLISHED = [
    ("d3LLM-LLaDA GSM8K-CoT", [(1.0, 74.02), (9.11, 73.09)], 74.98, 637.7),
    ("d3LLM-LLaDA MATH", [(1.0, 32.76), (5.74, 30.36)], 41.15, 107.6),
    ("d3LLM-LLaDA MBPP", [(1.0, 42.0), (4.21, 40.60)], 63.6, 88.4),
    ("d3LLM-LLaDA HumanEval", [(1.0, 39.8), (5.95, 39.63)], 67.73, 96.6),
    ("d3LLM-LLaDA Long-GSM8K", [(1.0, 78.32), (6.95, 74.22)], 82.56, 441.1),
    ("d3LLM-Dream GSM8K-CoT", [(1.0, 83.47), (4.94, 81.36)], 83.94, 391.3),
    ("dParallel-LLaDA GSM8K-CoT", [(1.0, 74.0), (5.14, 72.63)], 74.98, 358.1),
]


@pytest.mark.parametrize(("name", "pairs", "y_max", "published"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_numbers_come_back(name, pairs, y_max, published):
    assert aup(pairs, y_max=y_max).value == pytest.approx(published, abs=0.05)


def test_the_published_mean_comes_back():
    values = [aup(pairs, y_max=y_max).value for name, pairs, y_max, _ in PUBLISHED if name.startswith("d3LLM-LLaDA")]
    assert math.fsum(values) / 5 == pytest.approx(274.3, abs=0.05)


def test_by_hand():
    assert aup([(1.0, 80.0), (2.0, 80.0), (5.0, 80.0)]).value == pytest.approx(5 * 80), "flat: width times accuracy"
    dropped = 76 * math.exp(-3 * (1 - 76 / 80))
    got = aup([(3.0, 76.0), (9.0, 74.9), (1.0, 80.0)])
    assert got.value == pytest.approx(80 + 80 + dropped), "74.9 is more than 5 below 80"
    assert (got.left_out, got.pairs) == (1, ((1.0, 80.0), (3.0, 76.0)))
    assert "1 of 3 left out, more than 5 points below 80.0%" in got.why
    assert aup([(1.0, 80.0), (3.0, 76.0)], y_max=70).value == pytest.approx(80 + 2 * 78), "no more than a weight of 1"
    assert aup([(3.0, 76.0), (1.0, 80.0), (3.0, 75.5)]).value == aup([(1.0, 80.0), (3.0, 76.0)]).value


def test_what_cannot_be_computed_says_why():
    none = aup([])
    assert (none.value, none.why) == (None, "not computed: no text was written")
    low = aup([(1.0, 3.3), (2.0, 3.0)])
    assert low.value is None
    assert "accuracy too low, 3.3%" in low.why
    assert aup([(1.0, 0.0)], y_max=0.0).value is None
    one = aup([(2.0, 50.0)])
    assert one.value == 100.0, "as the leaderboard counts AR"
    assert "too few points for a curve" in one.why
    for message, call in {
        r"accuracy \(percent\)=101": lambda: aup([(1.0, 101)]),
        "tokens per forward=0.0": lambda: aup([(0.0, 50)]),
        "y_max=0": lambda: aup([(1.0, 50)], y_max=0),
    }.items():
        with pytest.raises(ConfigError, match=message):
            call()


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(6, 100)), min_size=1, max_size=8))
def test_it_grows_with_accuracy_and_knows_no_order(pairs):
    area = aup(pairs, y_max=100).value
    assert area == aup(pairs[::-1], y_max=100).value
    assert area <= aup([(x, 100.0) for x, _ in pairs], y_max=100).value + 1e-6
    widest = max(x for x, _ in pairs)
    assert aup([(x, 100.0) for x, _ in pairs]).value == pytest.approx(100 * widest)


def point(name, right, tokens, stopped=None):
    """20 documents of task "a", of which some are right, at 10 forwards each, and two of choices."""
    written = [ScoredDocument("a", i, float(i < right), tokens, 10, 1.0) for i in range(20)]
    choices = [ScoredDocument("b", i, 1.0, 0, 1, 1.0, written=False) for i in range(2)]
    return Point(name, {}, [*written, *choices], stopped)


def test_a_point_that_does_not_tell_all_its_forwards_has_no_area_and_says_so():
    known = point("k4", 16, 20)
    for lost in ({"forwards": None}, {"tokens": None}):
        first, *rest = known.samples
        got = areas([("fluid", replace(known, samples=[replace(first, **lost), *rest])), ("ar", known)])
        assert (got["fluid"]["a"].value, got["fluid"]["a"].pairs) == (None, ())
        assert got["fluid"]["a"].why == "not computed: forwards or tokens are not known"
        assert got["ar"]["a"].value == pytest.approx(160)


def test_methods_are_measured_by_the_best_accuracy_of_all():
    points = [("fluid", point("k4", 16, 20)), ("fluid", point("k8", 16, 40)), ("ar", point("ar", 20, 10))]
    stopped = ("fluid", point("k16", 16, 80, stopped="below k8"))
    got = areas([*points, stopped])
    assert list(got) == ["fluid", "ar"]
    assert list(got["fluid"]) == ["a"], "choices write no text"
    assert got["fluid"]["a"].pairs == ((2.0, 80.0), (4.0, 80.0)), "what was stopped takes no part"
    assert got["fluid"]["a"].y_max == 100.0
    assert got["fluid"]["a"].value == pytest.approx(2 * 80 + 2 * 80 * math.exp(-3 * 0.2))
    rows = as_rows(got)
    assert [(row["method"], row["mean"]) for row in rows] == [
        ("fluid", got["fluid"]["a"].value),
        ("ar", pytest.approx(100.0)),
    ]
    none = replace(got["ar"]["a"], value=None, why="not computed: accuracy too low")
    assert as_rows({"ar": {"a": none, "c": got["ar"]["a"]}})[0]["mean"] is None, "no mean over a part of the tasks"
