"""Intervals against known values, and costs that count everything once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fluid_eval.common.stats import (
    difference_over_tasks,
    geometric,
    interval,
    mcnemar,
    mean_over_tasks,
    minimum_detectable,
    ratio_of_sums,
    sureness,
)
from fluid_eval.results.metrics import cost, table_rows
from fluid_model.common.errors import ConfigError


def test_wilson_against_published_values():
    """Newcombe (1998), table I: Wilson score intervals without continuity correction."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        estimate = interval([1.0] * hits + [0.0] * (n - hits))
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
        assert (estimate.mean, estimate.n) == (hits / n, n)


def test_other_values_get_the_normal_interval():
    estimate = interval([0.0, 0.5, 1.0, 0.5])
    half = 1.959964 * math.sqrt((0.5 / 3) / 4)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert math.isnan(interval([]).mean)


@pytest.mark.parametrize("n", [10, 20, 60])
@pytest.mark.parametrize("skew", [0.3, 0.8])
def test_speed_ratios_cover(n, skew):
    """The interval of a ratio of two speeds holds the true one in 93 to 98% of simulated comparisons, of few documents
    too, some of which are much longer than others. (The percentile bootstrap: 83 to 90% of 10.)
    """
    rng, times = np.random.default_rng(2), 400
    tokens = np.exp(rng.normal(3.5, skew, (times, n)))
    base, other = (tokens / by * np.exp(rng.normal(0, 0.4, (times, n))) for by in (1.0, 1.5))
    intervals = [
        ratio_of_sums([t, a], [b, t], [n // 2, n - n // 2]) for t, a, b in zip(tokens, base, other, strict=True)
    ]  # fmt: skip
    held = np.mean([one.low <= 1.5 <= one.high for one in intervals])
    print(f"{n} documents, lengths spread by {skew}: {held:.3f} held")
    assert 0.93 <= held <= 0.985


def test_few_documents_give_no_interval():
    tokens, forwards = [10.0] * 9, [5.0, 6.0, 7.0] * 3
    estimate = ratio_of_sums([tokens], [forwards], [9])
    assert (estimate.mean, estimate.bounded, estimate.to_dict()["low"]) == (pytest.approx(90 / 54), False, None)
    assert ratio_of_sums([[*tokens, 10.0]], [[*forwards, 5.0]], [10]).bounded


def test_speeds_measured_again():
    """By hand: logs 0, 1, 2 have a standard error of 1 / sqrt(3), and t is 4.3027."""
    estimate = geometric([1.0, math.e, math.e**2])
    assert [math.log(x) for x in (estimate.mean, estimate.low, estimate.high)] == pytest.approx(
        [1, 1 - 4.302653 / 3**0.5, 1 + 4.302653 / 3**0.5]
    )
    assert not geometric([3.0]).bounded, "one run says nothing of the next"
    assert sureness([1.2]) == 0.0
    assert sureness([1.0, 1.0, 1.0]) == 0.0
    assert sureness([1.1, 1.1]) == 1.0
    assert sureness([1.0, math.e, math.e**2]) == pytest.approx(1 - 0.1127, abs=1e-4), "t = 1.732 on 2 degrees"


def test_repeats_cover_the_machine():
    """95% of intervals of 3 and of 5 repeats hold the true speed, where a machine's runs differ by a tenth."""
    rng = np.random.default_rng(7)
    for n in (3, 5):
        runs = np.exp(rng.normal(0, 0.1, (600, n)))
        held = np.mean([one.low <= 1 <= one.high for one in map(geometric, runs.tolist())])
        print(f"{n} repeats: {held:.3f} held")
        assert 0.93 <= held <= 0.97


def scores_of(lost, gained, n):
    """Of a base and another run on n documents, a fifth of which both get wrong."""
    base = [1.0] * lost + [0.0] * gained + [1.0] * (4 * n // 5 - lost) + [0.0] * (n - 4 * n // 5 - gained)
    return base, [0.0] * lost + [1.0] * gained + base[lost + gained :]


@pytest.mark.parametrize(
    ("sizes", "lost", "gained"),
    [
        ((100,), 0.01, 0.0),
        ((210,), 0.01, 0.0),
        ((500,), 0.005, 0.0),
        ((210,), 0.03, 0.03),
        ((210,), 0.15, 0.1),
        ((15, 210, 60), 0.02, 0.0),
        ((210,) * 4, 0.01, 0.0),
        ((210,) * 4, 0.03, 0.03),
    ],
)
def test_intervals_of_paired_differences_cover(sizes, lost, gained):
    """Few flips, to one side or both: of 300 simulated comparisons at least 94% hold the true difference."""
    rng, held, intervals = np.random.default_rng(3), [], {}
    for counts in zip(*(rng.multinomial(n, (lost, gained, 1 - lost - gained), size=300) for n in sizes), strict=True):
        key = tuple((int(b), int(c), n) for (b, c, _), n in zip(counts, sizes, strict=True))
        if key not in intervals:
            intervals[key] = difference_over_tasks(*zip(*(scores_of(*task) for task in key), strict=True))
        held.append(intervals[key].low <= gained - lost <= intervals[key].high)
    print(f"{sizes} -{lost:.1%} +{gained:.1%}: {np.mean(held):.3f} held")
    assert np.mean(held) >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "share"), [((15, 15, 15), 0.98), ((210,) * 4, 0.97), ((40, 300), 0.6)])
def test_intervals_of_means_over_tasks_cover(sizes, share):
    rng = np.random.default_rng(4)
    held = []
    for counts in zip(*(rng.binomial(n, share, size=400) for n in sizes), strict=True):
        estimate = mean_over_tasks([[1.0] * k + [0.0] * (n - k) for k, n in zip(counts, sizes, strict=True)])
        held.append(estimate.low <= share <= estimate.high)
    print(f"{sizes} {share:.0%}: {np.mean(held):.3f} held")
    assert np.mean(held) >= 0.92


def test_no_interval_is_a_point():
    """All right, all wrong, no flip, or every answer lost: what was seen of so few documents is not certain."""
    estimate = mean_over_tasks([[1.0] * 15] * 3)
    one = interval([1.0] * 15)
    assert (estimate.mean, estimate.high, estimate.n) == (1, 1, 45)
    assert 1 - estimate.low == pytest.approx((1 - one.low) / math.sqrt(3)), "three tasks are surer than one"
    none, all_lost = (difference_over_tasks([[1.0] * 15], [[score] * 15]) for score in (1.0, 0.0))
    assert (none.low, none.high) == pytest.approx((-0.163, 0.163), abs=5e-4)
    assert (all_lost.mean, all_lost.low) == (-1, -1)
    assert all_lost.high > -0.8


def test_bonett_and_prices_interval_by_hand():
    """Of 50 documents 9 lost and 2 gained: (3 - 10) / 52, give or take 1.96 sqrt((13 / 52 - (7 / 52)^2) / 52)."""
    base = [[1.0] * 9 + [0.0] * 2 + [1.0] * 39]
    estimate = difference_over_tasks(base, [[0.0] * 9 + [1.0] * 41])
    half = 1.959964 * math.sqrt((13 / 52 - (7 / 52) ** 2) / 52)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((-7 / 50, -7 / 52 - half, -7 / 52 + half))
    quarters = difference_over_tasks([[0.25, 0.5, 0.0]], [[0.5, 0.5, 0.25]])
    assert (quarters.low, quarters.high) == pytest.approx((1 / 6 - 1.959964 / 12, 1 / 6 + 1.959964 / 12))


@given(st.lists(st.lists(st.sampled_from("ngl="), min_size=1, max_size=9), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_difference_is_that_of_the_means_and_turns_with_its_sign(tasks):
    base, other = ([[float(kind in right) for kind in task] for task in tasks] for right in ("l=", "g="))
    difference, turned = difference_over_tasks(base, other), difference_over_tasks(other, base)
    assert difference.mean == pytest.approx(mean_over_tasks(other).mean - mean_over_tasks(base).mean)
    assert (turned.low, turned.high) == pytest.approx((-difference.high, -difference.low))
    assert -1 <= difference.low <= difference.mean <= difference.high <= 1
    assert difference.n == sum(map(len, tasks))


def test_ratio_of_sums_by_hand():
    estimate = ratio_of_sums([[10, 30]], [[5, 5]], [2])
    assert estimate.mean == 4
    assert ratio_of_sums([[1, 1]], [[0, 0]], [2]) is None
    same = ratio_of_sums([[1, 2, 3] * 4, [4, 5, 6] * 4], [[4, 5, 6] * 4, [1, 2, 3] * 4], [8, 4])
    assert (same.low, same.mean, same.high) == (1, 1, 1), "as fast as itself, whatever the documents"


def test_mcnemar_against_known_values():
    """Sign test tables: 5 of 20, 1 of 10; Agresti's approval ratings, 86 of 236, where z = -4.17."""
    assert mcnemar(5, 15) == mcnemar(15, 5) == pytest.approx(0.0414, abs=5e-5)
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(86, 150) == pytest.approx(3.7e-5, abs=1e-6)
    assert (mcnemar(6, 0), mcnemar(7, 7), mcnemar(0, 0)) == (pytest.approx(2 / 64), 1.0, 1.0)


def test_the_minimum_detectable_difference_is_connors():
    """Connor's (1987) sample sizes as calculators give them, two-sided 5%, 80% power: 155 pairs for 30% against 15%,
    23 for 45% against 5%.
    """
    for n, discordant, difference in ((155, 0.45, 0.15), (23, 0.5, 0.4)):
        detectable, with_one_less = (minimum_detectable(pairs, discordant) for pairs in (n, n - 1))
        assert detectable <= difference < with_one_less
    for n, discordant in ((50, 0.0), (200, 0.01), (1000, 0.005)):
        alone = minimum_detectable(n, discordant)
        assert alone == pytest.approx(minimum_detectable(n, alone)), "all discordant pairs to one side"
    assert minimum_detectable(3, 0.5) == 1.0
    assert minimum_detectable(0, 0.5) == 1.0


@pytest.mark.parametrize(("n", "discordant"), [(210, 0.15), (840, 0.1), (1319, 0.06), (164, 0.3)])
def test_a_minimum_detectable_difference_is_found_in_four_of_five(n, discordant):
    """By counting: of simulated comparisons with that true difference, as many are found by the exact test, which is
    a little stricter than the normal one of the formula.
    """
    actual = minimum_detectable(n, discordant)
    rng = np.random.default_rng(n)
    pairs = rng.multinomial(n, [(discordant - actual) / 2, (discordant + actual) / 2, 1 - discordant], size=4000)
    b, c = pairs[:, 0], pairs[:, 1]
    normal = (c - b) ** 2 > 1.96**2 * (b + c)
    exact = 2 * binom.cdf(np.minimum(b, c), b + c, 0.5) < 0.05
    assert 0.78 <= normal.mean() <= 0.83
    assert 0.72 <= exact.mean() <= 0.81


def test_nonsense_is_named():
    for message, call in {
        r"tasks of \[\] documents": lambda: mean_over_tasks([]),
        r"tasks of \[1, 0\] documents": lambda: mean_over_tasks([[1.0], []]),
        "scores of two runs are paired": lambda: difference_over_tasks([[1.0]], [[1.0, 0.0]]),
        "a column of 1 numbers: there are 2": lambda: ratio_of_sums([[1.0]], [[1.0, 2.0]], [2]),
        "b=-1": lambda: mcnemar(-1, 0),
        "discordant=1.5": lambda: minimum_detectable(10, 1.5),
    }.items():
        with pytest.raises(ConfigError, match=message):
            call()


def record(finish, ids, forwards, seconds, scores, truncated=0):
    return {
        "finish": finish, "output_ids": ids, "trace": {"forwards": forwards, "slots": 10}, "seconds": seconds,
        "truncated": truncated, "scores": scores,
    }  # fmt: skip


def test_costs():
    records = [
        record("length", [1, 2, 3], {"prefill": 1, "denoise": 1, "verify": 1, "commit": 0}, 0.5, {"acc,none": 1.0}, 4),
        record("eos", [1], {"prefill": 1, "denoise": 0, "verify": 0, "commit": 0}, 0.5, {"acc,none": 0.0}),
    ]
    spent = cost(records)
    assert (spent.tokens, spent.forwards, spent.tokens_per_forward, spent.tokens_per_second) == (4, 4, 1.0, 4.0)
    assert spent.forwards_by_kind == {"prefill": 2, "denoise": 1, "verify": 1, "commit": 0}
    assert (spent.slots, spent.slots_per_token) == (20, 5.0)
    assert (spent.truncated_prompts, spent.length_limit_hits) == (1, 1)
    (line,) = table_rows("t", records)
    assert (line.metric, line.filter, line.score, line.n) == ("acc", "none", 0.5, 2)
    mixed = cost([*records, record(None, [], {"prefill": 7}, 3.0, {"acc,none": 1.0})])
    assert (mixed.forwards, mixed.slots, mixed.seconds) == (11, 30, 4.0)
    ratios = [(c.tokens_per_forward, c.tokens_per_second, c.slots_per_token) for c in (spent, mixed)]
    assert ratios[0] == ratios[1], "likelihood tasks write nothing"
    scored = cost([record(None, [], {"prefill": 1}, 0.1, {})])
    assert (scored.tokens_per_forward, scored.tokens_per_second, scored.slots_per_token) == (None, None, None)
