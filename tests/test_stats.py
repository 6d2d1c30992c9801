"""Intervals against known values, and costs that count everything once."""

from __future__ import annotations

import math

import pytest

from fluid_eval.metrics import cost, lines
from fluid_eval.stats import interval


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
