"""Quality against speed: what each point of a sweep reaches, and which points another one beats at both. No torch.

Comparisons rest on a bootstrap: documents are drawn again with replacement, as many of each task as there are, and
every point is measured on the same ones: what is hard for one is mostly hard for another, so their difference is surer
than two intervals let one think. Tokens/s vary with the machine: they compare by repeats in which points took turns.

Legend: P points, D documents, R draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least
from fluid_model.settings import check_range

from ..common.stats import Interval, drawn, geometric, mean_over_tasks, ratio_of_sums, sums, sureness
from .points import Point

if TYPE_CHECKING:
    from numpy import bool_, float64, int64
    from numpy.typing import NDArray

    Floats = NDArray[float64]

Speed = Literal["tokens_per_second", "tokens_per_forward", "forwards_per_answer"]
"""Of forwards per answer, fewer are faster."""
SPEEDS: tuple[Speed, ...] = get_args(Speed)
LEAST = 20
"""Common documents below which no point is said to beat another: drawn again, a handful is too sure of itself."""
SURE = 0.95
"""Share of the draws in which a point must be beaten to count as dominated."""
_SAME = 1e-9
"""Equal numbers that were reached in two ways may differ by rounding; differences up to this, of speeds up to this part
of them, are none.
"""


@dataclass(frozen=True)
class Placed:
    """One point, measured on the documents it answered, each number with its 95% interval.

    n: documents answered.  score: mean over tasks of each task's mean, so that a task with many documents does not
    outweigh the others.  tokens_per_second and tokens_per_forward: sum over sum, and forwards_per_answer: a mean, over
    the answers of tasks that write (those in which the point wrote a token at all; an empty answer among them counts
    with its cost). None where nothing was written.
    repeats: how often the same answers were timed again. tokens_per_second is their geometric mean, and its interval
    theirs; without repeats it has none.
    dominated_by: the fastest point that scores no less and is faster, both in 95% of the draws; faster in tokens/s: in
    repeats taken in turns, sure to 95% by Student's t.
    """

    name: str
    settings: Mapping[str, Any]
    n: int
    score: Interval
    tokens_per_second: Interval | None
    tokens_per_forward: Interval | None
    forwards_per_answer: Interval | None
    repeats: int = 0
    dominated_by: str | None = None
    stopped: str | None = None


def measure(
    points: Sequence[Point], *, by: Speed = "tokens_per_second", draws: int = 1000, seed: int = 0
) -> list[Placed]:
    """Every point with its intervals and the point that dominates it, if one does, by the speed `by`.

    A point's own numbers are over its own documents, and owe nothing to what other points there are. Two points are
    compared on the documents both answered, if those are at least LEAST. One that was stopped early dominates no other.
    """
    _check(by, draws)
    _check_names(points)
    board = _lay_out(points)
    placed = [_place(point) for point in points]
    better = _dominators(board, points, by, draws, seed)
    return [_with_best(placed, i, better[i], by) for i in range(len(points))]


def below(
    a: Point, b: Point, *, by: Speed = "tokens_per_second", draws: int = 1000, seed: int = 0, sure: float = 0.99
) -> bool:
    """Whether b scores more and is faster than a, both in a share of at least `sure` of the draws: a may be stopped.

    Faster in tokens/s: as sure by the points' paces.  Over the documents both answered; False while those are fewer
    than LEAST.
    """
    _check(by, draws)
    check_range("sure", sure, 0, 1)
    board = _lay_out([a, b])
    docs = board.held[0] & board.held[1]
    if docs.sum() < LEAST:
        return False
    if by == "tokens_per_second" and _faster(a, b) < sure:
        return False
    return _ahead(_replicas(board, [0, 1], docs, draws, seed), 0, 1, by, strictly=True) >= sure


def frontier(placed: Sequence[Placed], by: Speed = "tokens_per_second") -> list[str]:
    """Names, slowest first, of the points that no other passes in mean score or mean speed without losing in the other.

    Points that were stopped early are left out, as their means are of other documents, and points without that speed.
    """
    _check(by)
    ranked = [(speed, p) for p in placed if p.stopped is None and (speed := pace(p, by)) is not None]

    def passed(speed: float, score: float) -> bool:
        """Whether another point gains in one and loses in neither."""
        margin = _SAME * abs(speed)
        gains = ((other - speed, p.score.mean - score) for other, p in ranked)
        return any(a >= -margin and b >= -_SAME and (a > margin or b > _SAME) for a, b in gains)

    return [p.name for speed, p in sorted(ranked, key=lambda one: one[0]) if not passed(speed, p.score.mean)]


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

    baseline: a point's name; None takes the best score there is.  points: what `placed` was measured from; with them
    the loss must be that small for sure, which is to say at the lower end of the 95% interval of the paired difference.
    Points that were stopped early do not take part.
    """
    _check(by, draws)
    if not placed:
        raise ConfigError("placed=[]: there is nothing to choose from")
    whole = {p.name: p for p in placed if p.stopped is None}
    if baseline is None:
        if not whole:
            return None
        baseline = _greatest({p.name: p.score.mean for p in whole.values()}, _SAME)
    if baseline not in whole:
        raise ConfigError(f"baseline={baseline!r} must be a point that was not stopped early: {', '.join(whole)}")
    if points is None:
        losses = {p.name: whole[baseline].score.mean - p.score.mean for p in whole.values()}
    elif missing := whole.keys() - {p.name for p in points}:
        raise ConfigError(f"points lack {', '.join(sorted(missing))}, which placed has")
    else:
        _check_names(points)
        losses = _greatest_losses([p for p in points if p.name in whole], baseline, draws, seed)
    near = [p for p in whole.values() if losses[p.name] <= within / 100 + _SAME]
    paces = {p.name: speed for p in near if (speed := pace(p, by)) is not None}
    return whole[_greatest(paces)] if paces else None


def aup(pairs: Iterable[tuple[float, float]], *, y_max: float | None = None, published: bool = False) -> float:
    """Area under the accuracy-parallelism curve of (tokens per forward, accuracy in percent) pairs.

    From the least to the most tokens per forward, by trapezoids over y w(y): w(y) = min(exp(-3 (1 - y / y_max)), 1)
    makes lost accuracy cost more than itself. y_max: the best accuracy among the pairs unless given, such as the AR
    parent's. Of pairs with the same tokens per forward, but for rounding, the most accurate one counts; where that
    leaves fewer than two the area is 0.
    published: as the d3LLM leaderboard has it (AUP, arXiv 2601.07568; alpha 3). Pairs more than 5 points below the one
    with the least tokens per forward are dropped, and that one's tokens per forward times its accuracy is added, for
    the way from 0 to it. Only such areas may stand beside published ones.
    """
    curve: dict[float, float] = {}
    for x, y in sorted(pairs):
        check_range("tokens per forward", x, 0, math.inf, open_low=True)
        check_range("accuracy (percent)", y, 0, 100)
        x = next((held for held in curve if math.isclose(held, x, rel_tol=_SAME)), x)
        curve[x] = max(y, curve.get(x, 0.0))
    if not curve:
        raise ConfigError("pairs=[]: an area needs (tokens per forward, accuracy) pairs")
    top = max(curve.values()) if y_max is None else y_max
    if y_max is not None:
        check_range("y_max", y_max, 0, 100, open_low=True)
    if top == 0:
        return 0.0
    steps = sorted(curve.items())
    if published:
        steps = [(x, y) for x, y in steps if y >= steps[0][1] - 5 - 100 * _SAME]
    head = steps[0][0] * steps[0][1] if published else 0.0
    heights = [(x, y * min(math.exp(-3 * (1 - y / top)), 1.0)) for x, y in steps]
    return head + math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(heights))


def pace(placed: Placed, by: Speed) -> float | None:
    """A point's mean speed as a number of which more is faster: forwards per answer come negative."""
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
    """Points and documents side by side, the documents sorted by task.

    task: (D,) number of each document's task.  held: (P, D) who answered what.  values: (P, D, 4) score; tokens,
    forwards, answers of tasks that write.
    """

    task: NDArray[int64]
    held: NDArray[bool_]
    values: Floats


def _lay_out(points: Sequence[Point]) -> _Board:
    """Raises ConfigError if a point answered nothing, or a document twice."""
    import numpy as np

    if empty := [p.name for p in points if not p.samples]:
        raise ConfigError(f"point {empty[0]!r} has no samples; leave it out")
    keys = sorted({(s.task, s.doc) for p in points for s in p.samples})
    place = {key: i for i, key in enumerate(keys)}
    number = {task: i for i, task in enumerate(dict.fromkeys(task for task, _ in keys))}
    held = np.zeros((len(points), len(keys)), dtype=bool)
    values = np.zeros((*held.shape, 4))
    for i, p in enumerate(points):
        writing = {s.task for s in p.samples if s.tokens}
        for s in p.samples:
            at = place[s.task, s.doc]
            if held[i, at]:
                raise ConfigError(f"point {p.name!r} has two samples of document {s.doc} of {s.task}")
            held[i, at] = True
            cost = (s.tokens, s.forwards, 1) if s.written and s.task in writing else (0, 0, 0)
            values[i, at] = (s.score, *cost)
    return _Board(np.array([number[task] for task, _ in keys]), held, values)


def _replicas(board: _Board, who: Sequence[int], docs: NDArray[bool_], draws: int, seed: int) -> dict[str, Floats]:
    """Score and speeds of points over the same drawn documents: (1 + R, P) each, row 0 undrawn, NaN for no speed."""
    import numpy as np

    _, sizes = np.unique(board.task[docs], return_counts=True)
    values = board.values[np.ix_(np.asarray(who), np.flatnonzero(docs))]  # (P, D, 4)
    values[:, :, 0] /= np.repeat(sizes * len(sizes), sizes)  # so that the scores' sum is the mean of the tasks' means
    columns = values.transpose(1, 2, 0).reshape(len(values[0]), -1)  # (D, 4 P)
    found = sums(drawn(sizes.tolist(), draws, seed), columns)
    score, tokens, forwards, answers = np.moveaxis(found.reshape(-1, 4, len(who)), 1, 0)

    def ratio(over: Floats, under: Floats) -> Floats:
        return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)

    return {
        "score": score,
        "tokens_per_forward": ratio(tokens, forwards),
        "forwards_per_answer": ratio(forwards, answers),
    }


def _place(point: Point) -> Placed:
    scores: dict[str, list[float]] = {}
    for sample in point.samples:
        scores.setdefault(sample.task, []).append(sample.score)
    writing = {sample.task for sample in point.samples if sample.tokens}
    wrote = sorted((s for s in point.samples if s.written and s.task in writing), key=lambda sample: sample.task)
    sizes = list(Counter(sample.task for sample in wrote).values())
    tokens, forwards = [float(s.tokens) for s in wrote], [float(s.forwards) for s in wrote]
    seconds = math.fsum(sample.seconds for sample in wrote)
    pace = Interval(math.fsum(tokens) / seconds, math.nan, math.nan, len(wrote)) if seconds else None
    if point.paces:
        pace = geometric(list(point.paces.values()))
    return Placed(
        point.name,
        point.settings,
        len(point.samples),
        mean_over_tasks(list(scores.values())),
        pace,
        ratio_of_sums([tokens], [forwards], sizes) if wrote else None,
        ratio_of_sums([forwards], [[1.0] * len(wrote)], sizes) if wrote else None,
        len(point.paces),
        stopped=point.stopped,
    )


def _dominators(board: _Board, points: Sequence[Point], by: Speed, draws: int, seed: int) -> list[list[int]]:
    """For each point, those that dominate it. Pairs with the same common documents are drawn together."""
    import numpy as np

    together: dict[bytes, list[tuple[int, int]]] = {}
    for b in (i for i, p in enumerate(points) if p.stopped is None):
        for a in (i for i in range(len(points)) if i != b):
            together.setdefault((board.held[a] & board.held[b]).tobytes(), []).append((a, b))
    found: list[list[int]] = [[] for _ in points]
    for common, pairs in together.items():
        docs = np.frombuffer(common, dtype=bool)
        if docs.sum() < LEAST:
            continue
        who = sorted({i for pair in pairs for i in pair})
        column = {i: j for j, i in enumerate(who)}
        drawn = _replicas(board, who, docs, draws, seed)
        for a, b in pairs:
            if by == "tokens_per_second" and _faster(points[a], points[b]) < SURE:
                continue
            if _ahead(drawn, column[a], column[b], by, strictly=False) >= SURE:
                found[a].append(b)
    return found


def _ahead(drawn: Mapping[str, Floats], a: int, b: int, by: Speed, *, strictly: bool) -> float:
    """Share of the draws in which b is faster than a and scores no less (`strictly`: more). In tokens/s no draw says
    which is faster: that is for `_faster`.
    """
    gain = drawn["score"][1:, b] - drawn["score"][1:, a]
    more = gain > _SAME if strictly else gain >= -_SAME
    if by == "tokens_per_second":
        return float(more.mean())
    speed = _sign(by) * drawn[by][1:]
    faster = speed[:, b] - speed[:, a] > _SAME * abs(speed[:, a])
    return float((faster & more).mean())


def _faster(a: Point, b: Point) -> float:
    """How sure it is that b writes more tokens/s than a, by the repeats in which both took turns."""
    return sureness([pace / a.paces[turn] for turn, pace in b.paces.items() if turn in a.paces])


def _with_best(placed: Sequence[Placed], i: int, better: Sequence[int], by: Speed) -> Placed:
    """Point i with the fastest of those that dominate it."""
    paces = {placed[b].name: speed for b in better if (speed := pace(placed[b], by)) is not None}
    return replace(placed[i], dominated_by=_greatest(paces) if paces else None)


def _greatest(values: Mapping[str, float], margin: float | None = None) -> str:
    """The first of those that nothing passes by more than the margin, by default that of speeds."""
    top = max(values.values())
    least = top - (_SAME * abs(top) if margin is None else margin)
    return next(name for name, value in values.items() if value >= least)


def _greatest_losses(points: Sequence[Point], baseline: str, draws: int, seed: int) -> dict[str, float]:
    """How much less each point may score than the baseline: the far end of the paired difference's 95% interval."""
    import numpy as np

    board = _lay_out(points)
    base = [p.name for p in points].index(baseline)
    found = {}
    for i, p in enumerate(points):
        docs = board.held[i] & board.held[base]
        if docs.any():
            score = _replicas(board, [i, base], docs, draws, seed)["score"]
            found[p.name] = float(-np.percentile(score[1:, 0] - score[1:, 1], 2.5))
        else:
            found[p.name] = math.inf
    return found
