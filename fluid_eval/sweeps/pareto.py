"""The accuracy/throughput frontier of a sweep: scores and speeds of its points, and which points dominate others. No
torch.

Scores and counted speeds are compared by a paired bootstrap: documents are resampled with replacement within each task,
the same for all points. Documents are about equally hard for all points, so a paired difference varies less than two
separate intervals suggest. Tokens/s vary with the machine: they are compared by speed repeats taken in turns.

Legend: P points, D documents, R resamples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least
from fluid_model.settings import check_range

from ..common.stats import Interval, drawn, geometric, mean_over_tasks, ratio_of_sums, sums, sureness
from ..results.metrics import total
from .points import Point, ScoredDocument

if TYPE_CHECKING:
    from numpy import bool_, float64, int64
    from numpy.typing import NDArray

    Floats = NDArray[float64]

Speed = Literal["tokens_per_second", "tokens_per_forward", "forwards_per_answer"]
"""Fewer forwards per answer are faster."""
SPEEDS: tuple[Speed, ...] = get_args(Speed)
BY: Speed = "tokens_per_second"
WITHIN = 1.0
"""Points of score that the best point may lie below the baseline, unless another number is given."""
LEAST = 20
"""Fewest common documents for a comparison: a bootstrap over a handful is overconfident."""
CONFIDENCE = 0.95
"""Share of the resamples in which another point must be better for a point to count as dominated."""
_SAME = 1e-9
"""Differences up to this are rounding and count as none; of speeds, relative differences."""


@dataclass(frozen=True)
class Placed:
    """One point's score and speeds on the documents it answered, each with its 95% interval.

    n: documents answered.
    score: mean over tasks of each task's mean, so that a task with many documents does not outweigh the others.
    tokens_per_second, tokens_per_forward: ratios of sums over the generated answers; None without any.
    forwards_per_answer: mean over the same answers. They are those of tasks in which the point generated a token; an
    empty answer counts with its cost.
    method: its decoder, with or without verification; "" if unknown.
    repeats: number of speed repeats. tokens_per_second is their geometric mean, with its interval; without repeats it
    has no interval.
    dominated_by: the fastest point that scores no less and is faster, in 95% of the resamples. Faster in tokens/s: in
    the repeats taken in turns, with 95% confidence by Student's t.
    """

    name: str
    settings: Mapping[str, Any]
    n: int
    score: Interval
    tokens_per_second: Interval | None
    tokens_per_forward: Interval | None
    forwards_per_answer: Interval | None
    method: str = ""
    repeats: int = 0
    dominated_by: str | None = None
    stopped: str | None = None


def measure(
    points: Sequence[Point], *, by: Speed = "tokens_per_second", draws: int = 1000, seed: int = 0
) -> list[Placed]:
    """Every point with its intervals and the point that dominates it, if any, by the speed `by`.

    A point's own numbers are over its own documents and do not depend on other points. Two points are compared on their
    common documents, if those are at least LEAST. A point that was stopped early dominates no other.
    Raises ConfigError if a point has no samples, or two points share a name.
    """
    _check(by, draws)
    _check_names(points)
    board = _lay_out(points)
    placed = [_place(point) for point in points]
    better = _dominators(board, points, by, draws, seed)
    return [_with_best(placed, i, better[i], by) for i in range(len(points))]


def below(
    a: Point, b: Point, *, by: Speed = "tokens_per_second", draws: int = 1000, seed: int = 0, confidence: float = 0.99
) -> bool:
    """Whether b scores more and is faster than a, in at least `confidence` of the resamples: a may be stopped.

    Faster in tokens/s: with the same confidence, by the points' paces.  Over their common documents; False while those
    are fewer than LEAST.
    """
    _check(by, draws)
    check_range("confidence", confidence, 0, 1)
    board = _lay_out([a, b])
    docs = board.answered[0] & board.answered[1]
    if docs.sum() < LEAST:
        return False
    if by == "tokens_per_second" and _faster(a, b) < confidence:
        return False
    return _ahead(_resampled(board, [0, 1], docs, draws, seed), 0, 1, by, strictly=True) >= confidence


def frontier(placed: Sequence[Placed], by: Speed = "tokens_per_second") -> list[str]:
    """Names, slowest first, of the Pareto-optimal points by mean score and mean speed.

    Left out are points without that speed, and points that were stopped early: their means are of other documents.
    """
    _check(by)
    ranked = [(speed, p) for p in placed if p.stopped is None and (speed := pace(p, by)) is not None]

    def is_beaten(speed: float, score: float) -> bool:
        """Whether another point is better in score or speed and worse in neither."""
        margin = _SAME * abs(speed)
        gains = ((other - speed, p.score.mean - score) for other, p in ranked)
        return any(a >= -margin and b >= -_SAME and (a > margin or b > _SAME) for a, b in gains)

    return [p.name for speed, p in sorted(ranked, key=lambda one: one[0]) if not is_beaten(speed, p.score.mean)]


def best(
    placed: Sequence[Placed],
    *,
    baseline: str | None = None,
    within: float,
    by: Speed = "tokens_per_second",
    points: Sequence[Point] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Placed | None:
    """The fastest point whose score is at most `within` percentage points below the baseline's, None if there is none.

    baseline: a point's name; None takes the best score.
    points: those that `placed` was measured from. With them, the far end of the 95% interval of the paired difference
    must lie within the bound, not only the mean.
    Points that were stopped early do not take part. Raises ConfigError for a baseline that is no such point.
    """
    _check(by, draws)
    if not placed:
        raise ConfigError("placed=[]: there is nothing to choose from")
    complete = {p.name: p for p in placed if p.stopped is None}
    if baseline is None:
        if not complete:
            return None
        baseline = _greatest({p.name: p.score.mean for p in complete.values()}, _SAME)
    if baseline not in complete:
        raise ConfigError(f"baseline={baseline!r} must be a point that was not stopped early: {', '.join(complete)}")
    if points is None:
        losses = {p.name: complete[baseline].score.mean - p.score.mean for p in complete.values()}
    elif missing := complete.keys() - {p.name for p in points}:
        raise ConfigError(f"points lack {', '.join(sorted(missing))}, which placed has")
    else:
        _check_names(points)
        losses = _greatest_losses([p for p in points if p.name in complete], baseline, draws, seed)
    near = [p for p in complete.values() if losses[p.name] <= within / 100 + _SAME]
    paces = {p.name: speed for p in near if (speed := pace(p, by)) is not None}
    return complete[_greatest(paces)] if paces else None


def pace(placed: Placed, by: Speed) -> float | None:
    """A point's mean speed, forwards per answer negated, so that a larger number is faster."""
    speed: Interval | None = getattr(placed, by)
    return None if speed is None else _sign(by) * speed.mean


def _sign(by: Speed) -> int:
    return -1 if by == "forwards_per_answer" else 1


def _check_names(points: Sequence[Point]) -> None:
    if not points:
        raise ConfigError("points=[]: there is nothing to measure")
    name, count = Counter(p.name for p in points).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{count} points are named {name!r}; each needs a name of its own")


def _check(by: Speed, draws: int = 1) -> None:
    if by not in SPEEDS:
        raise ConfigError(f"by={by!r} must be one of {', '.join(SPEEDS)}")
    at_least("draws", draws, 1)


@dataclass(frozen=True)
class _Board:
    """All points' values over all documents, the documents sorted by task.

    task: (D,) number of each document's task.  answered: (P, D) whether a point answered a document.
    values: (P, D, 4) score; tokens, forwards and number of generated answers.
    """

    task: NDArray[int64]
    answered: NDArray[bool_]
    values: Floats


def _lay_out(points: Sequence[Point]) -> _Board:
    """Raises ConfigError if a point has no samples, or two of one document."""
    import numpy as np

    # 1) the documents that any point answered, by task
    if empty := [p.name for p in points if not p.samples]:
        raise ConfigError(f"point {empty[0]!r} has no samples; leave it out")
    keys = sorted({(s.task, s.doc) for p in points for s in p.samples})
    column = {key: i for i, key in enumerate(keys)}
    task_number = {task: i for i, task in enumerate(dict.fromkeys(task for task, _ in keys))}
    # 2) each point's values
    answered = np.zeros((len(points), len(keys)), dtype=bool)  # (P, D)
    values = np.zeros((*answered.shape, 4))  # (P, D, 4)
    for i, point in enumerate(points):
        generating = {s.task for s in point.samples if s.tokens}
        for sample in point.samples:
            at = column[sample.task, sample.doc]
            if answered[i, at]:
                raise ConfigError(f"point {point.name!r} has two samples of document {sample.doc} of {sample.task}")
            answered[i, at] = True
            counts = sample.written and sample.task in generating
            known = counts and sample.tokens is not None and sample.forwards is not None
            cost = (sample.tokens, sample.forwards, 1) if known else (0, 0, 0)
            values[i, at] = (sample.score, *cost)
    return _Board(np.array([task_number[task] for task, _ in keys]), answered, values)


def _resampled(board: _Board, who: Sequence[int], docs: NDArray[bool_], draws: int, seed: int) -> dict[str, Floats]:
    """Score and speeds of points over the same resampled documents: (1 + R, P) each, NaN for no speed.

    Row 0 is of the documents as they are. who: numbers of the points.  docs: (D,) documents to resample.
    """
    import numpy as np

    _, sizes = np.unique(board.task[docs], return_counts=True)
    values = board.values[np.ix_(np.asarray(who), np.flatnonzero(docs))]  # (P, D, 4)
    values[:, :, 0] /= np.repeat(sizes * len(sizes), sizes)  # their sum is the mean of the tasks' means
    columns = values.transpose(1, 2, 0).reshape(len(values[0]), -1)  # (D, 4 P)
    totals = sums(drawn(sizes.tolist(), draws, seed), columns)  # (1 + R, 4 P)
    score, tokens, forwards, answers = np.moveaxis(totals.reshape(-1, 4, len(who)), 1, 0)  # (1 + R, P) each

    def ratio(over: Floats, under: Floats) -> Floats:
        return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)

    return {
        "score": score,
        "tokens_per_forward": ratio(tokens, forwards),
        "forwards_per_answer": ratio(forwards, answers),
    }


def _place(point: Point) -> Placed:
    """A point's own score and speeds with their intervals."""
    # 1) scores by task; samples whose cost counts, by task
    scores: dict[str, list[float]] = {}
    for sample in point.samples:
        scores.setdefault(sample.task, []).append(sample.score)
    generating = {sample.task for sample in point.samples if sample.tokens}
    generated = [sample for sample in point.samples if sample.written and sample.task in generating]
    generated.sort(key=lambda sample: sample.task)
    sizes = list(Counter(sample.task for sample in generated).values())
    # 2) tokens/s: the repeats' mean, or that of one run without an interval
    written = total(sample.tokens for sample in generated)
    seconds = total(sample.seconds for sample in generated)
    pace = Interval(written / seconds, math.nan, math.nan, len(generated)) if seconds and written is not None else None
    if point.paces:
        pace = geometric(list(point.paces.values()))
    return Placed(
        name=point.name,
        settings=point.settings,
        method=point.method,
        n=len(point.samples),
        score=mean_over_tasks(list(scores.values())),
        tokens_per_second=pace,
        tokens_per_forward=_ratio(generated, sizes, "tokens", "forwards"),
        forwards_per_answer=_ratio(generated, sizes, "forwards", None),
        repeats=len(point.paces),
        stopped=point.stopped,
    )


def _ratio(samples: Sequence[ScoredDocument], sizes: Sequence[int], over: str, under: str | None) -> Interval | None:
    """Ratio of the sums of two counts (under: None counts answers); None where there is none, or one is unknown."""
    counts = [(getattr(sample, over), 1 if under is None else getattr(sample, under)) for sample in samples]
    if not counts or any(None in pair for pair in counts):
        return None
    above, below = ([float(value) for value in column] for column in zip(*counts, strict=True))
    return ratio_of_sums([above], [below], sizes)


def _dominators(board: _Board, points: Sequence[Point], by: Speed, draws: int, seed: int) -> list[list[int]]:
    """For each point, the numbers of those that dominate it."""
    import numpy as np

    # 1) pairs (a, b), may b dominate a, by their common documents: equal sets are resampled once
    pairs_of: dict[bytes, list[tuple[int, int]]] = {}
    for b in (i for i, p in enumerate(points) if p.stopped is None):
        for a in (i for i in range(len(points)) if i != b):
            pairs_of.setdefault((board.answered[a] & board.answered[b]).tobytes(), []).append((a, b))
    # 2) compare each pair on its resampled documents
    dominators: list[list[int]] = [[] for _ in points]
    for common, pairs in pairs_of.items():
        docs = np.frombuffer(common, dtype=bool)
        if docs.sum() < LEAST:
            continue
        who = sorted({i for pair in pairs for i in pair})
        column = {i: j for j, i in enumerate(who)}
        resampled = _resampled(board, who, docs, draws, seed)
        for a, b in pairs:
            if by == "tokens_per_second" and _faster(points[a], points[b]) < CONFIDENCE:
                continue
            if _ahead(resampled, column[a], column[b], by, strictly=False) >= CONFIDENCE:
                dominators[a].append(b)
    return dominators


def _ahead(resampled: Mapping[str, Floats], a: int, b: int, by: Speed, *, strictly: bool) -> float:
    """Share of the resamples in which b is faster than a and scores no less (`strictly`: more).

    Resampled documents say nothing about tokens/s: then only scores are compared here, and speeds by `_faster`.
    """
    gain = resampled["score"][1:, b] - resampled["score"][1:, a]  # (R,)
    scores = gain > _SAME if strictly else gain >= -_SAME
    if by == "tokens_per_second":
        return float(scores.mean())
    speed = _sign(by) * resampled[by][1:]  # (R, P)
    faster = speed[:, b] - speed[:, a] > _SAME * abs(speed[:, a])
    return float((faster & scores).mean())


def _faster(a: Point, b: Point) -> float:
    """Confidence that b generates more tokens/s than a, by the repeats that both took in turns."""
    return sureness([pace / a.paces[turn] for turn, pace in b.paces.items() if turn in a.paces])


def _with_best(placed: Sequence[Placed], i: int, better: Sequence[int], by: Speed) -> Placed:
    """Point i with the fastest of those that dominate it."""
    paces = {placed[b].name: speed for b in better if (speed := pace(placed[b], by)) is not None}
    return replace(placed[i], dominated_by=_greatest(paces) if paces else None)


def _greatest(values: Mapping[str, float], margin: float | None = None) -> str:
    """The first name whose value is within the margin of the largest. margin: default: rounding of speeds."""
    top = max(values.values())
    least = top - (_SAME * abs(top) if margin is None else margin)
    return next(name for name, value in values.items() if value >= least)


def _greatest_losses(points: Sequence[Point], baseline: str, draws: int, seed: int) -> dict[str, float]:
    """Each point's largest plausible loss against the baseline: the far end of the 95% interval, paired."""
    import numpy as np

    board = _lay_out(points)
    base = [p.name for p in points].index(baseline)
    losses = {}
    for i, point in enumerate(points):
        docs = board.answered[i] & board.answered[base]
        if docs.any():
            score = _resampled(board, [i, base], docs, draws, seed)["score"]
            losses[point.name] = float(-np.percentile(score[1:, 0] - score[1:, 1], 2.5))
        else:
            losses[point.name] = math.inf
    return losses
