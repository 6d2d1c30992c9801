"""Equivalence tests: is a measured mean within a margin of a published one, beyond it, or is n too small to tell?

Within: two one-sided tests (TOST, Schuirmann 1987). Beyond: one test on the side that was seen. Neither may hold, so
there are three answers. Shares are tested exactly (binomial tails; limits of Clopper and Pearson 1934), other means by
their normal limits.

            low      published     high
    ---------[------------+----------]---------
                      <=====>                      within: the interval of the measurement lies inside
              <==========================>         cannot tell
                                          <====>   beyond

Legend: shares lie in 0..1; low and high bound the values that count as equal to the published one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.stats import Z95, Interval

LEVEL = 0.05
"""Significance level of every test."""
Z_LEVEL = 1.6448536269514722
Z_POWER = 1.2815515655446004
"""Normal quantiles: of a one-sided 5% test, and of 80% power for two of them at once."""
SMALLEST = 1e-6
"""Margins below this are taken as this: no number of questions resolves them."""
STEPS = 30
"""Bisections of a p-value."""


def within(measured: Interval, low: float, high: float, *, share: bool) -> float:
    """p of two one-sided tests that the true value lies in [low, high].

    share: the values are shares, counted over measured.n; a bound at or past 0 or 1 then needs no test.
    """
    above = 0.0 if share and low <= 0 else _tail(measured, low, share=share, up=True)
    below = 0.0 if share and high >= 1 else _tail(measured, high, share=share, up=False)
    return max(above, below)


def beyond(measured: Interval, low: float, high: float, *, share: bool, published_n: int | None = None) -> float:
    """p of a two-sided test that the true value lies outside [low, high].

    published_n: questions behind the published value, if known. Its own chance then counts too, as of other questions,
    which is the worst case. The distances of both limits add up as variances do (MOVER; Zou and Donner 2008, Stat. Med.
    27:1693).
    """
    if low <= measured.mean <= high:
        return 1.0
    bound, up = (low, False) if measured.mean < low else (high, True)
    middle = (low + high) / 2
    # 1) the measurement's own chance; the published value's can only make p larger
    alone = _tail(measured, bound, share=share, up=up)
    if published_n is None or alone > LEVEL:
        return min(1.0, 2 * alone)
    published = Interval(middle, math.nan, math.nan, published_n)

    # 2) the p at which both limits together just reach the bound, by bisection
    def combined_distance(p: float) -> float:
        ours = abs(_limit(measured, p, share=share, up=not up) - measured.mean)
        theirs = abs(_limit(published, p, share=share, up=up) - middle)
        return math.hypot(ours, theirs)

    small, large = 0.0, 0.5
    for _ in range(STEPS):
        p = (small + large) / 2
        if combined_distance(p) < abs(measured.mean - bound):
            large = p
        else:
            small = p
    return 2 * large


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): of all tables, at most LEVEL have one below LEVEL by chance."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = least
    return corrected


def questions_needed(spread: float, margin: float) -> int:
    """Questions for which `within` succeeds with a power of 80% if the true value is the published one.

    spread: standard deviation of one question's value.
    """
    return math.ceil((spread * (Z_LEVEL + Z_POWER) / max(margin, SMALLEST)) ** 2)


def _count(measured: Interval) -> int | None:
    """Number of right answers among measured.n; None where the mean is not a share of a count."""
    right = round(measured.mean * measured.n)
    return right if math.isclose(right, measured.mean * measured.n, abs_tol=1e-6) else None


def _tail(measured: Interval, bound: float, *, share: bool, up: bool) -> float:
    """Probability of a mean as large (up) or as small as measured, if the bound were the true value."""
    from scipy.special import bdtr, bdtrc, ndtr

    right = _count(measured) if share else None
    if right is None:
        side = measured.mean - measured.low if up else measured.high - measured.mean
        distance = measured.mean - bound if up else bound - measured.mean
        return float(ndtr(-Z95 * distance / side)) if side > 0 else float(distance <= 0)
    bound = min(1.0, max(0.0, bound))
    if up:
        return float(bdtrc(right - 1, measured.n, bound)) if right else 1.0
    return float(bdtr(right, measured.n, bound))


def _limit(measured: Interval, p: float, *, share: bool, up: bool) -> float:
    """One-sided confidence limit at level p: Clopper and Pearson's of a counted share, else the normal one."""
    from scipy.special import betaincinv, ndtri

    right = measured.mean * measured.n
    if share and (math.isnan(measured.low) or _count(measured) is not None):
        if up:
            return 1.0 if right >= measured.n else float(betaincinv(right + 1, measured.n - right, 1 - p))
        return 0.0 if right <= 0 else float(betaincinv(right, measured.n - right + 1, p))
    side = measured.high - measured.mean if up else measured.mean - measured.low
    return measured.mean + (1 if up else -1) * side * float(-ndtri(p)) / Z95
