"""Intervals against known values, and costs that count everything once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fluid_eval.metrics import cost, lines
from fluid_eval.stats import drawn, interval, mcnemar, mean_over_tasks, minimum_detectable, ratio_of_sums
from fluid_model.errors import ConfigError


def test_wilson_against_published_values():
    """Newcombe (1998), table I: Wilson score intervals without continuity correction."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = interval([1.0] * hits + [0.0] * (n - hits))
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
        assert (found.mean, found.n) == (hits / n, n)


def test_other_values_get_the_normal_interval():
    found = interval([0.0, 0.5, 1.0, 0.5])
    half = 1.959964 * math.sqrt((0.5 / 3) / 4)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert math.isnan(interval([]).mean)


def test_bootstrap_intervals_cover():
    """A 95% interval of 4,000 simulated comparisons holds the true value in 93 to 97% of them: the paired difference of
    scores over two tasks, and the ratio of two speeds. All at once; some are held against the functions themselves.
    """
    rng, times, sizes = np.random.default_rng(2), 4000, [120, 80]
    luck = rng.random((200, times))
    lost, gained = (np.repeat(shares, sizes)[:, None] for shares in ([0.10, 0.10], [0.15, 0.05]))
    scores = np.select([luck < lost, luck < lost + gained], [-1.0, 1.0], 0.0)  # truly +5 and -5 points, 0 in all
    tokens = rng.integers(20, 60, (200, times)).astype(float)
    base, other = tokens / 100 * rng.uniform(0.5, 2, (200, times)), tokens / 150 * rng.uniform(0.5, 2, (200, times))
    counts = drawn(sizes, 1000, 0)
    means = counts @ (scores / np.repeat(sizes, sizes)[:, None] / 2)
    ratios = (counts @ base) / (counts @ other)
    for values, true in ((means, 0.0), (ratios, 1.5)):
        low, high = np.percentile(values[1:], (2.5, 97.5), axis=0)
        assert 0.93 <= ((low - 1e-9 <= true) & (true <= high + 1e-9)).mean() <= 0.97
    for i in range(3):
        found = mean_over_tasks([scores[:120, i], scores[120:, i]], draws=1000)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means[1:, i], (2.5, 97.5))), abs=1e-12)
        columns = [tokens[:, i], base[:, i]], [other[:, i], tokens[:, i]]
        speed = ratio_of_sums(*columns, sizes, draws=1000)
        assert (speed.low, speed.high) == pytest.approx(tuple(np.percentile(ratios[1:, i], (2.5, 97.5))))


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=9), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_mean_over_tasks_is_theirs_and_turns_with_its_sign(tasks):
    found = mean_over_tasks(tasks, draws=60)
    turned = mean_over_tasks([[-value for value in task] for task in tasks], draws=60)
    assert found.mean == pytest.approx(np.mean([np.mean(task) for task in tasks]))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert (found.n, mean_over_tasks(tasks, draws=60)) == (sum(map(len, tasks)), found)
    assert mean_over_tasks([[0.0] * len(task) for task in tasks], draws=9).high == 0, "no difference, no interval"


def test_ratio_of_sums_by_hand():
    found = ratio_of_sums([[10, 30]], [[5, 5]], [2])
    assert (found.mean, found.low, found.high) == (4, 2, 6)
    assert ratio_of_sums([[1, 1]], [[0, 0]], [2]) is None
    same = ratio_of_sums([[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]], [2, 1])
    assert (same.low, same.mean, same.high) == (1, 1, 1), "as fast as itself, whatever is drawn"


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
        found, with_one_less = (minimum_detectable(pairs, discordant) for pairs in (n, n - 1))
        assert found <= difference < with_one_less
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
    true = minimum_detectable(n, discordant)
    rng = np.random.default_rng(n)
    pairs = rng.multinomial(n, [(discordant - true) / 2, (discordant + true) / 2, 1 - discordant], size=4000)
    b, c = pairs[:, 0], pairs[:, 1]
    normal = (c - b) ** 2 > 1.96**2 * (b + c)
    exact = 2 * binom.cdf(np.minimum(b, c), b + c, 0.5) < 0.05
    assert 0.78 <= normal.mean() <= 0.83
    assert 0.72 <= exact.mean() <= 0.81


def test_nonsense_is_named():
    for message, call in {
        r"tasks of \[\] documents": lambda: mean_over_tasks([]),
        r"tasks of \[1, 0\] documents": lambda: mean_over_tasks([[1.0], []]),
        "draws=0": lambda: mean_over_tasks([[1.0]], draws=0),
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
    (line,) = lines("t", records)
    assert (line.metric, line.filter, line.score, line.n) == ("acc", "none", 0.5, 2)
    mixed = cost([*records, record(None, [], {"prefill": 7}, 3.0, {"acc,none": 1.0})])
    assert (mixed.forwards, mixed.slots, mixed.seconds) == (11, 30, 4.0)
    ratios = [(c.tokens_per_forward, c.tokens_per_second, c.slots_per_token) for c in (spent, mixed)]
    assert ratios[0] == ratios[1], "likelihood tasks write nothing"
    scored = cost([record(None, [], {"prefill": 1}, 0.1, {})])
    assert (scored.tokens_per_forward, scored.tokens_per_second, scored.slots_per_token) == (None, None, None)
