"""Is a measured number within a margin of another, beyond it, or can this many questions not tell.

Two one-sided tests say that it is within (Schuirmann 1987), one that it is beyond; the same question has three answers.
Counts are judged exactly (binomial tails, Clopper and Pearson 1934), other means by the distance to their limits.

Legend: shares lie in 0..1; low and high are the bounds of what counts as equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.stats import Z95, Interval

LEVEL = 0.05
"""Of every test here."""
Z_LEVEL = 1.6448536269514722
Z_POWER = 1.2815515655446004
"""Normal quantiles of a one-sided 5% test, and of 80% power for two of them at once."""
SMALLEST = 1e-6
"""A margin that no number of questions is for: what is asked for at less is this."""
STEPS = 30
"""Halvings of a p-value's bracket."""


def within(found: Interval, low: float, high: float, *, share: bool) -> float:
    """p of two one-sided tests that the true value lies in [low, high]: small where it surely does.

    share: the values are shares, of which found.n were seen; a bound at or past 0 or 1 needs no test then.
    """
    above = 0.0 if share and low <= 0 else _tail(found, low, share=share, up=True)
    below = 0.0 if share and high >= 1 else _tail(found, high, share=share, up=False)
    return max(above, below)


def beyond(found: Interval, low: float, high: float, *, share: bool, published_n: int | None = None) -> float:
    """p of a test that the true value lies outside [low, high], on whichever side: small where it surely does.

    published_n: questions behind the bounds' middle, where known. What chance moved there counts too, as if both had
    been asked of other questions, which is the worst case: their limits' distances add up as variances do (Zou and
    Donner 2008, Stat. Med. 27:1693).
    """
    if low <= found.mean <= high:
        return 1.0
    bound, up = (low, False) if found.mean < low else (high, True)
    middle = (low + high) / 2
    alone = _tail(found, bound, share=share, up=up)
    if published_n is None or alone > LEVEL:  # more chance can only make it larger, and it is too large already
        return min(1.0, 2 * alone)
    published = Interval(middle, math.nan, math.nan, published_n)

    def reach(p: float) -> float:
        ours = abs(_limit(found, p, share=share, up=not up) - found.mean)
        theirs = abs(_limit(published, p, share=share, up=up) - middle)
        return math.hypot(ours, theirs)

    small, large = 0.0, 0.5
    for _ in range(STEPS):
        p = (small + large) / 2
        small, large = (small, p) if reach(p) < abs(found.mean - bound) else (p, large)
    return 2 * large


def holm(values: Sequence[float]) -> list[float]:
    """p-values so corrected that at most LEVEL of all tables hold one that is small by chance (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, least = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[place]))
        found[place] = least
    return found


def questions_needed(spread: float, margin: float) -> int:
    """Questions whose mean is found within a margin of the true one with a power of 80%. spread: of one question's
    value, its standard deviation.
    """
    return math.ceil((spread * (Z_LEVEL + Z_POWER) / max(margin, SMALLEST)) ** 2)


def _count(found: Interval) -> int | None:
    """How many of found.n were right, None where the mean is of no count."""
    right = round(found.mean * found.n)
    return right if math.isclose(right, found.mean * found.n, abs_tol=1e-6) else None


def _tail(found: Interval, bound: float, *, share: bool, up: bool) -> float:
    """The chance to see as much (up) or as little, if the bound were the true value."""
    from scipy.special import bdtr, bdtrc, ndtr

    right = _count(found) if share else None
    if right is None:
        side = found.mean - found.low if up else found.high - found.mean
        distance = found.mean - bound if up else bound - found.mean
        return float(ndtr(-Z95 * distance / side)) if side > 0 else float(distance <= 0)
    bound = min(1.0, max(0.0, bound))
    if up:
        return float(bdtrc(right - 1, found.n, bound)) if right else 1.0
    return float(bdtr(right, found.n, bound))


def _limit(found: Interval, p: float, *, share: bool, up: bool) -> float:
    """The one-sided limit at level p: Clopper and Pearson's of a share that was counted, else the normal one."""
    from scipy.special import betaincinv, ndtri

    right = found.mean * found.n
    if share and (math.isnan(found.low) or _count(found) is not None):
        if up:
            return 1.0 if right >= found.n else float(betaincinv(right + 1, found.n - right, 1 - p))
        return 0.0 if right <= 0 else float(betaincinv(right, found.n - right + 1, p))
    side = found.high - found.mean if up else found.mean - found.low
    return found.mean + (1 if up else -1) * side * float(-ndtri(p)) / Z95
