"""What a measurement says of a published number, by exact enumeration where a rate is promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom

from fluid_eval.claims.equivalence import beyond, holm, questions_needed, within
from fluid_eval.claims.verdicts import Finding, Margins, judge
from fluid_eval.common.stats import Interval, interval
from fluid_eval.output.claims_tables import kind
from fluid_model import ConfigError

from .test_claims import claim


def counted(right, n):
    return interval([1.0] * right + [0.0] * (n - right))


def verdict_on(one, measured, **more):
    (judged,) = judge([Finding(one, measured)], **more)
    return judged.verdict


STATED = {"profile": "lm-eval"}


def test_five_questions_cannot_tell():
    """43.0 against 0 of 5 once passed as reproduced, since both intervals overlap."""
    verdict = verdict_on(claim(value=43.0, **STATED), counted(0, 5))
    assert kind(verdict) == "cannot tell"
    assert verdict == "cannot tell: n = 5 is too few for 3.0 points, about 2,333 would do if it is right"


@pytest.mark.parametrize(("n", "points"), [(164, 5.0), (164, 3.0), (500, 3.0), (1319, 3.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_claim_off_by_its_margin_or_more_passes_at_most_one_time_in_twenty(n, points, sign):
    """Exactly, over all counts that can be seen, at rates from a fifth to nine tenths."""
    for truth in (0.2, 0.5, 0.604, 0.89):
        one = claim(value=round(100 * truth + sign * points, 1), task="none", **STATED)
        width = points - 0.05  # the published value may be off by its rounding, too
        accepted_counts = [
            right for right in range(n + 1)
            if within(Interval(right / n, 0, 0, n), (one.value - points) / 100, (one.value + points) / 100, share=True)
            <= 0.05
        ]  # fmt: skip
        assert sum(binom.pmf(accepted_counts, n, truth)) <= 0.05, (n, truth)
        middle = round(n * truth)
        assert kind(verdict_on(one, counted(middle, n), margins=Margins(points=width))) != "reproduced", (
            "as far off as it is"
        )


def test_a_claim_five_points_too_high_at_164_questions_passes_rarely():
    """By the verdict itself and its default margin: no claim so far off passes more than 5% of the time."""
    for truth in (0.604, 0.89):
        one = claim(value=round(100 * truth + 5, 1), task="none", **STATED)
        passed = [right for right in range(165) if kind(verdict_on(one, counted(right, 164))) == "reproduced"]
        wide = [
            right for right in range(165)
            if kind(verdict_on(one, counted(right, 164), margins=Margins(points=4.95))) == "reproduced"
        ]  # fmt: skip
        assert sum(binom.pmf(passed, 164, truth)) <= 0.05
        assert sum(binom.pmf(wide, 164, truth)) <= 0.05


def test_thirty_one_true_cells_rarely_hold_a_false_alarm():
    """Each cell published exactly as it is, 31 of them, at a margin that leaves chance its room: 5% of tables at most.

    Of one-sided tails alone 80% held one.
    """
    rng, n, tables = np.random.default_rng(7), 164, 100
    bad = 0
    for _ in range(tables):
        truth = rng.integers(200, 900, 31) / 1000
        findings = [
            Finding(claim(value=100 * share, task="mini", n=10**6, **STATED), Interval(right / n, 0, 1, n))
            for share, right in zip(truth, rng.binomial(n, truth), strict=True)
        ]
        bad += any(kind(each.verdict) == "not reproduced" for each in judge(findings, Margins(points=0.01)))
    assert bad / tables <= 0.05


def test_a_gap_no_chance_explains_is_not_reproduced_and_a_close_one_is():
    """LLaDA's GSM8K as FLUID's README has it, had it been measured as its authors report it."""
    assert verdict_on(claim(value=36.2, **STATED), counted(1037, 1319)) == (
        "not reproduced: 42.4 points off, surely more than 3.0 points"
    )
    assert verdict_on(claim(value=91.9, **STATED), counted(1212, 1319)) == "reproduced: within 3.0 points"
    assert kind(verdict_on(claim(value=91.9, **STATED), counted(1180, 1319))) == "cannot tell", (
        "2.4 off, neither is sure"
    )
    assert verdict_on(claim(value=91.9, margin=5.0, **STATED), counted(1180, 1319)) == "reproduced: within 5.0 points"
    assert verdict_on(claim(value=50.0, task="humaneval", **STATED), counted(112, 164)).startswith("not reproduced")
    assert verdict_on(claim(value=58.0, task="humaneval", **STATED), counted(112, 164)).startswith("cannot tell")


def test_the_published_numbers_own_chance_counts_only_against_an_accusation():
    measured = Interval(0.60, 0.59, 0.61, 10_000)
    bounds = 0.47, 0.53
    alone = beyond(measured, *bounds, share=True)
    few, many = (beyond(measured, *bounds, share=True, published_n=n) for n in (164, 10**7))
    assert alone < 1e-6
    assert many < 1e-6
    assert few > 0.02, "164 questions are known to 7 points"
    assert within(measured, 0.57, 0.63, share=True) < 0.05, "the number as it stands"


def test_edges_of_shares_need_no_test():
    full = counted(100, 100)
    assert within(full, 0.97, 1.03, share=True) == pytest.approx(0.97**100)
    assert within(counted(0, 100), -0.03, 0.03, share=True) == pytest.approx(0.97**100)
    assert beyond(full, 0.97, 1.03, share=True) == 1.0


def test_holm_is_monotone_and_never_below_what_it_corrects():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    for values in itertools.permutations((0.001, 0.2, 0.9, 0.02)):
        measured = holm(values)
        assert all(f >= v for f, v in zip(measured, values, strict=True))
        assert sorted(measured) == [measured[p] for p in sorted(range(4), key=values.__getitem__)]


def test_the_questions_asked_for_do_tell():
    """With the n that is named, a right claim is found to be so in four of five measurements, counted exactly."""
    for truth in (0.43, 0.62, 0.9):
        n = questions_needed((truth * (1 - truth)) ** 0.5, 0.03)
        passed = [
            right for right in range(n + 1)
            if within(Interval(right / n, 0, 0, n), truth - 0.03, truth + 0.03, share=True) <= 0.05
        ]  # fmt: skip
        assert 0.75 <= sum(binom.pmf(passed, n, truth)) <= 0.87


def test_speeds_have_a_margin_in_percent_and_ranges_both_ends():
    speed = claim(unit="tok/forward", metric="tokens_per_forward", value=2.0, **STATED)
    assert verdict_on(speed, Interval(2.03, 2.0, 2.06, 600)) == "reproduced: within 0.1 tok/forward"
    assert verdict_on(speed, Interval(3.0, 2.9, 3.1, 600)).startswith("not reproduced: 1 tok/forward off")
    assert verdict_on(speed, Interval(2.0, 1.0, 3.0, 10)).startswith(
        "cannot tell: n = 10 is too few for 0.1 tok/forward, abo"
    )
    wide = claim(unit="times", metric="speed-up", value=4.7, to=5.9, **STATED)
    for seen in (4.8, 5.3, 5.8):
        assert kind(verdict_on(wide, Interval(seen, seen - 0.1, seen + 0.1, 9))) == "reproduced"
    assert kind(verdict_on(wide, Interval(7.0, 6.9, 7.1, 9))) == "not reproduced"


def test_our_own_figures_are_rerun_and_not_in_the_correction():
    ours = claim(value=74.8, **STATED)
    findings = [Finding(ours, counted(157, 210), own=True), Finding(ours, counted(156, 210), own=True)]
    both = judge([*findings, Finding(claim(value=36.2, **STATED), counted(1037, 1319))])
    assert [each.verdict for each in both[:2]] == ["re-run, equal", "re-run, differs: by 0.5 points"]
    assert both[0].p_within is None
    assert kind(both[2].verdict) == "not reproduced"


def test_what_is_unstated_is_said_with_the_verdict():
    measured = counted(1212, 1319)
    unknown = {"decoder": "unknown: text and code differ"}
    assert (
        verdict_on(claim(value=91.9, **STATED, **unknown), measured)
        == "reproduced (decoder not stated): within 3.0 points"
    )
    assert verdict_on(claim(value=91.9, **unknown), measured).startswith(
        "reproduced (convention and decoder not stated)"
    )
    (other,) = judge([Finding(claim(value=91.9, profile="x"), measured, as_stated=False)])
    assert (other.verdict, other.p_within) == ("different convention", None)
    with pytest.raises(ConfigError, match="margin=0"):
        Margins(points=0)
