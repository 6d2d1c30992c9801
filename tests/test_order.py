"""A set of samples has figures; the order it comes in, and what stands beside it, has none. To the last bit."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_eval.analysis.compare import compare
from fluid_eval.common.stats import (
    Interval,
    difference_over_tasks,
    drawn,
    interval,
    mean_over_tasks,
    ratio_of_sums,
    sums,
)
from fluid_eval.output.report.facts import gather
from fluid_eval.output.report.runs import read_runs
from fluid_eval.results.metrics import table_rows
from fluid_eval.results.run_folder import SAMPLES
from fluid_eval.sweeps.pareto import LEAST, SPEEDS, Placed, best, frontier, measure
from fluid_eval.sweeps.points import as_point

from .runs import write_run

SECONDS = st.floats(0, 1000) | st.sampled_from([0.0, 1e-9, 0.1, 1 / 3])
SCORES = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 1 / 3, 1.0])
RECORDS = st.lists(st.tuples(SCORES, SECONDS, st.integers(0, 9)), min_size=LEAST, max_size=LEAST + 9)


def record(doc, score, seconds, tokens):
    trace = {"forwards": {"prefill": 1, "commit": tokens}, "slots": 3 * tokens}
    return {
        "key": f"t{doc % 2}/{doc}", "task": f"t{doc % 2}", "doc_id": doc, "scores": {"acc,none": score},
        "finish": "eos", "output_ids": [0] * tokens, "trace": trace, "seconds": seconds, "truncated": 0,
    }  # fmt: skip


@given(RECORDS, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_scores_and_costs(drawn_records, chance):
    records = [record(doc, *each) for doc, each in enumerate(drawn_records)]
    shuffled = chance.sample(records, len(records))
    assert table_rows("t", shuffled) == table_rows("t", records)
    values, others = [r["scores"]["acc,none"] for r in records], [r["seconds"] for r in records]
    turned = [r["scores"]["acc,none"] for r in shuffled]
    assert interval(turned) == interval(values)
    assert mean_over_tasks([turned, others]) == mean_over_tasks([others, values])
    assert difference_over_tasks([turned], [[r["seconds"] for r in shuffled]]) == difference_over_tasks(
        [values], [others]
    )


@given(st.lists(RECORDS, min_size=2, max_size=4), st.randoms(use_true_random=False), st.sampled_from(SPEEDS))
@settings(max_examples=30)
def test_points_of_a_sweep(answers, chance, by):
    """Twins stand at other places among the points, with their samples in another order."""
    points = [
        as_point(f"p{i}", {}, [record(d, *each) for d, each in enumerate(a)], {"t0": "t0", "t1": "t1"})
        for i, a in enumerate(answers)
    ]
    turned = [replace(p, name=f"{p.name} again", samples=chance.sample(p.samples, len(p.samples))) for p in points]
    together = {p.name: p for p in measure(chance.sample([*points, *turned], 2 * len(points)), by=by, draws=40)}
    for alone in (placed for p in points for placed in measure([p], by=by, draws=40)):
        for name in (alone.name, f"{alone.name} again"):
            assert replace(together[name], name=alone.name, dominated_by=None) == alone
    here, there = ({p.name: p for p in measure(those, by=by, draws=40)} for those in (points, points[::-1]))
    assert {name: p.dominated_by for name, p in here.items()} == {name: p.dominated_by for name, p in there.items()}


def test_stored_runs(tmp_path):
    """A comparison, and what a report states, of the same lines in another order."""
    folders = [write_run(tmp_path / name, decoder, model="m") for name, decoder in (("a", "ar"), ("b", "fluid"))]

    def outputs():
        facts = gather(read_runs(folders)[0], None)
        return json.dumps(compare(folders)), facts.placed, facts.acceptance, facts.verdicts, facts.comparison

    before = outputs()
    for folder in folders:
        file = folder / SAMPLES
        stored = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(random.Random(1).sample(stored, len(stored))))
    assert outputs() == before


def test_sums_are_the_same_wherever_a_column_stands():
    rng = np.random.default_rng(0)
    columns = rng.uniform(0, 1, (61, 9)) * 10.0 ** rng.integers(-9, 9, 9)
    counts = drawn([20, 41], 50, 0)
    results, documents, places = sums(counts, columns), rng.permutation(61), rng.permutation(9)
    assert (sums(counts[:, documents], columns[documents][:, places]) == results[:, places]).all()
    assert (sums(counts[7:9], columns[:, 4:5]) == results[7:9, 4:5]).all()
    exact = [sum(int(n) * Fraction(x) for n, x in zip(counts[3], column, strict=True)) for column in columns.T]
    assert results[3].tolist() == pytest.approx([float(value) for value in exact], rel=1e-12)
    total = rng.integers(0, 10**9, (61, 2))
    assert (sums(counts, total.astype(float)) == counts.astype(int) @ total).all(), "whole numbers are exact"
    assert not sums(counts, np.zeros((61, 2))).any()


@given(st.lists(st.tuples(st.integers(0, 50), SECONDS), min_size=2, max_size=20), st.randoms(use_true_random=False))
def test_a_ratio_as_it_stands(pairs, chance):
    """The ratio and its interval."""
    results, again = (
        ratio_of_sums(*([column] for column in zip(*each, strict=True)), [len(pairs)])
        for each in (pairs, chance.sample(pairs, len(pairs)))
    )
    assert (results and results.to_dict()) == (again and again.to_dict())


def placed(name, score, speed):
    pace = Interval(speed, speed, speed, 1)
    return Placed(name, {}, 1, Interval(score, score, score, 1), pace, pace, pace, repeats=2)


def test_what_differs_by_rounding_alone_is_a_tie():
    """Equal numbers reached in two ways: 0.1 + 0.2 is not 0.3, nor is ten times 0.1 one."""
    one, other = placed("one", 0.3, sum([0.1] * 10)), placed("other", 0.1 + 0.2, 1.0)
    worse = placed("worse", 0.2, 1.0)
    for several in ([one, other, worse], [other, one, worse]):
        assert set(frontier(several)) == {"one", "other"}
        assert best(several, within=0).name == several[0].name, "the first of equals"
    assert frontier([placed("behind", 0.2, 1.0 + 1e-15), other]) == ["other"], "as fast, but for rounding"
