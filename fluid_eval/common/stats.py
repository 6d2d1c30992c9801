"""Intervals and paired tests. Counts get Wilson's interval, their paired differences Bonett and Price's, other means
and differences the normal one; over tasks, their limits are combined. Ratios of sums over documents get the
jackknife's, speeds measured again Student's t on logarithms. Documents are drawn with replacement, as many of each task
as there are (Efron and Tibshirani 1993, chapter 13), to see how often one point beats another at two things at once.
No figure depends on the order of what it is of: sums are exact before they are rounded, once.

Legend: D documents sorted by task, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least
from fluid_model.settings import check_range

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

    Floats = NDArray[float64]

Z95 = 1.959963984540054
Z80 = 0.8416212335729143
"""Normal quantiles of a two-sided 5% test and of 80% power."""
FEWEST = 10
"""Documents below which a ratio of sums has no interval."""
_ROUNDING = 1e-18
"""Sums of equal numbers may differ by rounding; squares up to this are 0."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, over n values; low and high are NaN where nothing says how sure the mean is."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)

    def to_dict(self) -> dict[str, float | None]:
        """mean, low, high, n; None for bounds that are not known."""
        low, high = (self.low, self.high) if self.bounded else (None, None)
        return {"mean": self.mean, "low": low, "high": high, "n": self.n}


def interval(values: Sequence[float]) -> Interval:
    """95% interval of a mean: Wilson's where every value is 0 or 1 (Wilson 1927), the normal one otherwise."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    if all(value in (0, 1) for value in values):
        from scipy.stats import binomtest

        found = binomtest(round(math.fsum(values)), n).proportion_ci(0.95, method="wilson")
        return Interval(mean, float(found.low), float(found.high), n)
    return _normal(values)


def _normal(values: Sequence[float]) -> Interval:
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z95 * math.sqrt(spread / n)
    return Interval(mean, mean - half, mean + half, n)


def drawn(sizes: Sequence[int], draws: int, seed: int) -> Floats:
    """How often each document is drawn: (1 + R, D). Row 0 is the documents as they are.

    sizes: documents of each task. Nothing else decides the draws, so whatever has the same documents shares them.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        picks = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
        found.append(np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size))
    return np.vstack([np.ones((1, sum(sizes))), np.hstack(found)])


def sums(counts: Floats, columns: Floats) -> Floats:
    """Sums of columns over documents that are drawn so often, in whatever order both stand: (1 + R, C).

    counts: (1 + R, D) of `drawn`.  columns: (D, C), finite. A product of matrices adds in an order of its own, which
    the place of a column decides. So each column is rounded to a grid on which every sum is exact: D times its largest
    number is 2^52 steps at most. Whole numbers stay as they are; others change by 2^-52 D of the largest.
    """
    import numpy as np

    _, power = np.frexp(len(columns) * abs(columns).max(axis=0, initial=0.0))
    found: Floats = np.ldexp(counts @ np.rint(np.ldexp(columns, 52 - power)), power - 52)
    return found


def mean_over_tasks(tasks: Sequence[Sequence[float]]) -> Interval:
    """Mean of the tasks' means, with its 95% interval. tasks: each task's values, of one or more documents.

    Raises ConfigError if there is no task, or one without values.
    """
    _check_tasks([len(task) for task in tasks])
    return _mean_of([interval(task) for task in tasks])


def difference_over_tasks(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Interval:
    """Mean over tasks of what the other run's mean is above the base's, with its 95% interval, paired.

    base, other: each task's scores, those of a document at the same place in both.
    Raises ConfigError if there is no task, one without scores, or both have not as many.
    """
    _check_tasks([len(task) for task in base])
    if [len(task) for task in base] != [len(task) for task in other]:
        raise ConfigError("scores of two runs are paired: each task needs as many of the one as of the other")
    return _mean_of([_paired(*task) for task in zip(base, other, strict=True)])


def _paired(base: Sequence[float], other: Sequence[float]) -> Interval:
    """Of one task: Bonett and Price's interval (2012, J. Educ. Behav. Stat. 37:479) where every score is 0 or 1, the
    normal one of the differences otherwise.

    As if each run had got one document more right alone: flips that are few, or all to one side, do not make it sure.
    """
    differences = [b - a for a, b in zip(base, other, strict=True)]
    if any(score not in (0, 1) for score in (*base, *other)):
        return _normal(differences)
    n = len(differences)
    lost, gained = ((differences.count(sign) + 1) / (n + 2) for sign in (-1, 1))
    half = Z95 * math.sqrt((lost + gained - (gained - lost) ** 2) / (n + 2))
    middle = gained - lost
    return Interval(math.fsum(differences) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


def _mean_of(tasks: Sequence[Interval]) -> Interval:
    """The mean of independent means: their distances to their limits add up as variances do (Zou and Donner 2008,
    Stat. Med. 27:1693).
    """
    mean = math.fsum(task.mean for task in tasks) / len(tasks)
    below, above = (
        math.sqrt(math.fsum(d * d for d in distances)) / len(tasks)
        for distances in ([t.mean - t.low for t in tasks], [t.high - t.mean for t in tasks])
    )
    return Interval(mean, mean - below, mean + above, sum(task.n for task in tasks))


def ratio_of_sums(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], sizes: Sequence[int]
) -> Interval | None:
    """Sum over sum, with its 95% interval; None where nothing stands below. sizes: documents of each task.

    over, under: columns of D numbers. Of several columns their sums are multiplied: the ratio of two runs' speeds on
    the same documents is `ratio_of_sums([tokens, base_forwards], [forwards, base_tokens], sizes)`.
    The interval is the jackknife's, of the logarithm (Efron and Tibshirani 1993, chapter 11), by Student's t with
    Satterthwaite's degrees of freedom; there is none below FEWEST documents that differ, where it would hold the truth
    too seldom.
    Raises ConfigError if there is no document or a column has another length.
    """
    _check_tasks(sizes)
    n = sum(sizes)
    if wrong := [len(column) for column in (*over, *under) if len(column) != n]:
        raise ConfigError(f"a column of {wrong[0]} numbers: there are {n} documents")
    columns = [(column, math.fsum(column), sign) for side, sign in ((over, 1), (under, -1)) for column in side]
    if any(total <= 0 for _, total, sign in columns if sign < 0):
        return None
    mean = math.prod(total**sign for _, total, sign in columns)
    without = [[(total - column[doc], sign) for column, total, sign in columns] for doc in range(n)]
    if n < 2 or any(rest <= 0 for each in without for rest, _ in each):
        return Interval(mean, math.nan, math.nan, n)

    # 1) what each document does to the logarithm, within its task
    logs = [math.fsum(sign * math.log(rest) for rest, sign in each) for each in without]
    squares: list[float] = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        own = logs[end - size : end]
        middle = math.fsum(own) / size
        squares += [(size - 1) / size * (log - middle) ** 2 for log in own]

    # 2) how sure their sum, the variance, is: few documents that decide it make it less so
    variance = math.fsum(squares)
    if variance <= _ROUNDING:  # all documents alike, such as AR's tokens a forward without ends
        return Interval(mean, mean, mean, n)
    if n < FEWEST:
        return Interval(mean, math.nan, math.nan, n)
    kurtosis = n * math.fsum(square**2 for square in squares) / variance**2
    # Satterthwaite's 2 n / (kurtosis - 1), halved: of few documents the kurtosis comes out too small
    freedom = min(max(n / max(kurtosis - 1, _ROUNDING), 1.0), max(n - len(sizes), 1))
    half = _student(freedom) * math.sqrt(variance)
    return Interval(mean, mean * math.exp(-half), mean * math.exp(half), n)


def geometric(values: Sequence[float]) -> Interval:
    """Geometric mean of positive values with the 95% interval by Student's t on their logarithms: of speeds measured
    again, and of their ratios. One value has no interval.
    """
    n = len(values)
    logs = [math.log(value) for value in values]
    middle = math.fsum(logs) / n
    if n == 1:
        return Interval(values[0], math.nan, math.nan, 1)
    error = math.sqrt(math.fsum((log - middle) ** 2 for log in logs) / (n - 1) / n)
    half = _student(n - 1) * error
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), n)


def sureness(ratios: Sequence[float]) -> float:
    """How sure it is that true ratios lie above 1, of those measured: Student's t on their logarithms, one-sided. 0 of
    fewer than two.
    """
    from scipy.stats import t

    if len(ratios) < 2:
        return 0.0
    found = geometric(ratios)
    middle, half = math.log(found.mean), math.log(found.high / found.mean)
    if half <= _ROUNDING:
        return float(middle > _ROUNDING)
    return float(t.cdf(middle / half * _student(len(ratios) - 1), len(ratios) - 1))


def _student(freedom: float) -> float:
    """97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test: whether of the documents that only one of two runs got right each had the
    same chance of them. b, c: documents that only the one, only the other, got right. 1 where there are none.

    (McNemar 1947; exact: a sign test, Agresti, Categorical Data Analysis, section 10.1.4)
    """
    from scipy.stats import binomtest

    at_least("b", b, 0)
    at_least("c", c, 0)
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def minimum_detectable(n: float, discordant: float) -> float:
    """The smallest true difference of two paired shares that McNemar's test at 5% finds with a power of 80%; 1 where
    n documents can show none.

    n: of a mean over tasks, as many as one task would need for its spread; that may be no whole number.
    discordant: share of the documents that only one of both gets right (of other scores: the mean squared difference).
    It cannot be less than the difference itself, so where few or none were seen, all are taken to be to one side.
    (Connor 1987, Biometrics 43:207: n d^2 = (z_a sqrt(s) + z_b sqrt(s - d^2))^2 with the discordant share s, solved for
    d: with x = d / sqrt(s), x sqrt(n) = z_a + z_b sqrt(1 - x^2), which n alone decides.)
    """
    at_least("n", n, 0)
    check_range("discordant", discordant, 0, 1)
    inside = n - Z95**2 + Z80**2
    if inside < 0:
        return 1.0
    x = (Z95 * math.sqrt(n) + Z80 * math.sqrt(inside)) / (n + Z80**2)
    return min(1.0, x * max(x, math.sqrt(discordant)))


def _check_tasks(sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"tasks of {list(sizes)} documents: there must be a task, and each needs a document")
