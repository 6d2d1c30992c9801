"""Confidence intervals (95%) and paired tests.

    quantity                           interval or test                                     function
    share of right answers             Wilson 1927                                          interval
    other means                        normal                                               interval
    mean over tasks                    limits combined (Zou and Donner 2008)                mean_over_tasks
    paired difference of shares        Bonett and Price 2012                                difference_over_tasks
    ratio of sums (tokens/forward)     jackknife of the logarithm, Student's t              ratio_of_sums
    repeated speeds                    Student's t on logarithms                            geometric
    discordant answers of two runs     exact McNemar test; minimum detectable effect        mcnemar, …
    two quantities (a Pareto front)    bootstrap over documents, stratified by task         drawn, sums
                                       (Efron and Tibshirani 1993, chapter 13)

Results do not depend on the order of documents: sums are exact, and rounded once (math.fsum).

Legend: D documents sorted by task, R bootstrap draws, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

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
"""Rounding error of a variance: up to this it counts as 0."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, over n values. low and high are NaN where no interval can be estimated."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def to_dict(self) -> dict[str, float | None]:
        """mean, low, high, n; None for bounds that cannot be estimated."""
        if not self.bounded:
            return {"mean": self.mean, "low": None, "high": None, "n": self.n}
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interval:
        """The interval of `to_dict`."""
        low, high = (math.nan if values[bound] is None else values[bound] for bound in ("low", "high"))
        return cls(values["mean"], low, high, values["n"])


def interval(values: Sequence[float]) -> Interval:
    """95% interval of a mean: Wilson's where every value is 0 or 1 (Wilson 1927), the normal one otherwise."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    if all(value in (0, 1) for value in values):
        from scipy.stats import binomtest

        wilson = binomtest(round(math.fsum(values)), n).proportion_ci(0.95, method="wilson")
        return Interval(mean, float(wilson.low), float(wilson.high), n)
    return _normal(values)


def _normal(values: Sequence[float]) -> Interval:
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def drawn(sizes: Sequence[int], draws: int, seed: int) -> Floats:
    """Bootstrap counts: how often each draw contains each document, (1 + R, D). Row 0 is the data itself, all ones.

    sizes: documents of each task; each draw resamples within tasks. Draws depend on sizes and seed alone, so all points
    of a sweep share them.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    counts = []
    for size in sizes:
        # (R, size) documents; a draw's are shifted by its own offset, so that one bincount serves all draws
        picks = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
        counts.append(np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size))
    return np.vstack([np.ones((1, sum(sizes))), np.hstack(counts)])  # (1 + R, D)


def sums(counts: Floats, columns: Floats) -> Floats:
    """Column sums of each bootstrap draw, counts @ columns, independent of the order of documents: (1 + R, C).

    counts: (1 + R, D) of `drawn`.  columns: (D, C), finite.
    A matrix product adds in an order that depends on the column's place. So each column is first rounded to a grid on
    which every sum is exact: D times its largest number is at most 2^52 grid steps. Whole numbers do not change; others
    change by at most 2^-52 D of the largest.
    """
    import numpy as np

    _, power = np.frexp(len(columns) * abs(columns).max(axis=0, initial=0.0))  # (C,)
    grid_steps = np.rint(np.ldexp(columns, 52 - power))  # (D, C)
    totals: Floats = np.ldexp(counts @ grid_steps, power - 52)
    return totals


def mean_over_tasks(tasks: Sequence[Sequence[float]]) -> Interval:
    """Mean of task means, with its 95% interval. tasks: values of each task, one a document.

    Raises ConfigError if there is no task, or a task without values.
    """
    _check_tasks([len(task) for task in tasks])
    return _mean_of([interval(task) for task in tasks])


def difference_over_tasks(base: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Interval:
    """Mean over tasks of the paired difference other - base, with its 95% interval.

    base, other: scores of each task; index i is the same document in both.
    Raises ConfigError if there is no task, a task without scores, or the two runs differ in length.
    """
    _check_tasks([len(task) for task in base])
    if [len(task) for task in base] != [len(task) for task in other]:
        raise ConfigError("scores of two runs are paired: each task needs as many of the one as of the other")
    return _mean_of([_paired(*task) for task in zip(base, other, strict=True)])


def _paired(base: Sequence[float], other: Sequence[float]) -> Interval:
    """Paired difference of one task. If every score is 0 or 1: Bonett and Price's interval (2012, J. Educ. Behav. Stat.
    37:479); else the normal one of the differences.

    Their adjustment adds one discordant document on each side. So few flips, or flips to one side only, do not give an
    interval of width 0.
    """
    differences = [theirs - ours for ours, theirs in zip(base, other, strict=True)]
    if any(score not in (0, 1) for score in (*base, *other)):
        return _normal(differences)
    n = len(differences)
    lost = (differences.count(-1) + 1) / (n + 2)
    gained = (differences.count(1) + 1) / (n + 2)
    half = Z95 * math.sqrt((lost + gained - (gained - lost) ** 2) / (n + 2))
    middle = gained - lost
    return Interval(math.fsum(differences) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


def _mean_of(tasks: Sequence[Interval]) -> Interval:
    """Mean of independent means. Distances from mean to limit add in squares, as standard errors do (Zou and Donner
    2008, Stat. Med. 27:1693).
    """
    mean = math.fsum(task.mean for task in tasks) / len(tasks)
    below = math.sqrt(math.fsum((task.mean - task.low) ** 2 for task in tasks)) / len(tasks)
    above = math.sqrt(math.fsum((task.high - task.mean) ** 2 for task in tasks)) / len(tasks)
    return Interval(mean, mean - below, mean + above, sum(task.n for task in tasks))


def ratio_of_sums(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]], sizes: Sequence[int]
) -> Interval | None:
    """Ratio of column sums, with its 95% interval; None where a denominator is 0. sizes: documents of each task.

    over, under: columns of D numbers. Sums of several columns are multiplied: the ratio of two runs' tokens/forward on
    the same documents is `ratio_of_sums([tokens, base_forwards], [forwards, base_tokens], sizes)`.
    The interval is the jackknife's, on the logarithm (Efron and Tibshirani 1993, chapter 11), by Student's t with
    Satterthwaite's degrees of freedom. There is none below FEWEST documents that differ: its coverage would be too low.
    Raises ConfigError if there is no document or a column has another length.
    """
    _check_tasks(sizes)
    n = sum(sizes)
    if wrong := [len(column) for column in (*over, *under) if len(column) != n]:
        raise ConfigError(f"a column of {wrong[0]} numbers: there are {n} documents")
    # 1) the ratio, and its value without each document (the jackknife)
    columns = [(column, math.fsum(column), 1) for column in over]
    columns += [(column, math.fsum(column), -1) for column in under]
    if any(total <= 0 for _, total, power in columns if power < 0):
        return None
    mean = math.prod(total**power for _, total, power in columns)
    without = [[(total - column[doc], power) for column, total, power in columns] for doc in range(n)]
    if n < 2 or any(rest <= 0 for sums_left in without for rest, _ in sums_left):
        return Interval(mean, math.nan, math.nan, n)
    logs = [math.fsum(power * math.log(rest) for rest, power in sums_left) for sums_left in without]

    # 2) the variance of the logarithm: squared influence of each document, within its task
    squares: list[float] = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        of_task = logs[end - size : end]
        middle = math.fsum(of_task) / size
        squares += [(size - 1) / size * (log - middle) ** 2 for log in of_task]
    variance = math.fsum(squares)
    if variance <= _ROUNDING:  # all documents alike, such as AR's one token a forward
        return Interval(mean, mean, mean, n)
    if n < FEWEST:
        return Interval(mean, math.nan, math.nan, n)

    # 3) degrees of freedom: fewer where few documents decide the variance
    kurtosis = n * math.fsum(square**2 for square in squares) / variance**2
    # Satterthwaite's 2 n / (kurtosis - 1), halved: the kurtosis of few documents is estimated too small
    freedom = min(max(n / max(kurtosis - 1, _ROUNDING), 1.0), max(n - len(sizes), 1))
    half = _student(freedom) * math.sqrt(variance)
    return Interval(mean, mean * math.exp(-half), mean * math.exp(half), n)


def geometric(values: Sequence[float]) -> Interval:
    """Geometric mean of repeated speeds or of their ratios, with the 95% interval by Student's t on logarithms.

    values: positive. One value has no interval.
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
    """Confidence that the true ratio exceeds 1, from repeated measurements: one-sided Student's t on logarithms.

    0 for fewer than two ratios.
    """
    from scipy.stats import t

    if len(ratios) < 2:
        return 0.0
    measured = geometric(ratios)
    middle = math.log(measured.mean)
    half = math.log(measured.high / measured.mean)
    if half <= _ROUNDING:
        return float(middle > _ROUNDING)
    return float(t.cdf(middle / half * _student(len(ratios) - 1), len(ratios) - 1))


def _student(freedom: float) -> float:
    """97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of McNemar's test, whose null is that discordant documents fall to either run equally often.

    b, c: documents that only the first, only the second run got right. 1 where there are none.
    (McNemar 1947; exact as a sign test: Agresti, Categorical Data Analysis, section 10.1.4)
    """
    from scipy.stats import binomtest

    at_least("b", b, 0)
    at_least("c", c, 0)
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def minimum_detectable(n: float, discordant: float) -> float:
    """Minimum detectable effect: the smallest true difference of two paired shares that McNemar's test at 5% detects
    with 80% power; 1 where n documents can detect none.

    n: documents; of a mean over tasks, the effective number, which need not be whole.
    discordant: share of documents that one run alone gets right (of other scores: the mean squared difference). It
    cannot be below the difference itself, so where few were observed all are taken to fall to one side.
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
