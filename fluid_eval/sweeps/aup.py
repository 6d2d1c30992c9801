"""AUP, accuracy under parallelism: d3LLM's one number for accuracy and tokens per forward (arXiv 2601.07568).

Of a method's pairs (x, y), tokens per forward and accuracy in percent on one task, in order of x, without those whose
accuracy lies more than 5 points below that of the first:

    AUP = x1 y1 + sum over i > 1 of (x_i - x_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2
    W(y) = min(exp(-3 (1 - y / y_max)), 1)

y_max is the best accuracy of any method on that task. Source: `AUP_leaderboard/aup_utils.py` of the repository
hao-ai-lab/d3LLM at commit e5bfcaccb775ee75759c24ccc9a28218b8372b34, and the authors' text of 10 December 2025.

Where conventions differ:
- Their text leaves pairs out that are too inaccurate. Their code refuses the method if its last pair is one. Here pairs
  are left out, as in the text, and counted.
- y_max is here the best accuracy among the points at hand, theirs that of a whole leaderboard. It lowers W alone.
- Tokens per forward count every forward here, prefill too. Their first pair is at exactly 1.
- Of pairs with equal tokens per forward the most accurate counts here, so that the area depends on no order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fluid_model.settings import check_range

from .points import Point

ALPHA = 3.0
"""Penalty of lost accuracy."""
DROP = 5.0
"""Points of accuracy below the first pair from which on a pair is left out."""
_UNKNOWN = "not computed: forwards or tokens are not known"
_SAME = 1e-9
"""Differences up to this are rounding."""


@dataclass(frozen=True)
class Area:
    """AUP of a method on one task.

    value: None if it cannot be computed.  why: the reason, or what to know of the value; "" if nothing.
    pairs: those it is over, (tokens per forward, accuracy in percent).  left_out: number of less accurate ones.
    y_max: the accuracy that W is measured by.
    """

    value: float | None
    why: str
    pairs: tuple[tuple[float, float], ...]
    left_out: int
    y_max: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "pairs": [list(pair) for pair in self.pairs]}


def aup(pairs: Iterable[tuple[float, float]], *, y_max: float | None = None) -> Area:
    """AUP of (tokens per forward, accuracy in percent) pairs of one method on one task.

    y_max: best accuracy of any method on the task; default: the best of the pairs.
    Raises ConfigError for values out of range.
    """
    # 1) the pairs, the most accurate of equal tokens per forward
    best: dict[float, float] = {}
    for x, y in sorted(pairs):
        check_range("tokens per forward", x, 0, math.inf, open_low=True)
        check_range("accuracy (percent)", y, 0, 100)
        x = next((known for known in best if math.isclose(known, x, rel_tol=_SAME)), x)
        best[x] = max(y, best.get(x, 0.0))
    curve = sorted(best.items())
    top = max(best.values(), default=0.0) if y_max is None else y_max
    # 2) those that are accurate enough
    if not curve:
        return Area(None, "not computed: no text was written", (), 0, top)
    first = curve[0][1]
    check_range("y_max", top, 0, 100, open_low=first > 0)
    kept = tuple((x, y) for x, y in curve if y >= first - DROP - _SAME)
    left_out = len(curve) - len(kept)
    if first <= DROP:
        why = f"not computed: accuracy too low, {first:.1f}% at the fewest tokens/forward, where no loss would count"
        return Area(None, why, kept, left_out, top)
    # 3) the area
    heights = [(x, y * min(math.exp(-ALPHA * (1 - y / top)), 1.0)) for x, y in kept]
    area = kept[0][0] * first
    area += math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(heights))
    notes = []
    if left_out:
        notes.append(f"{left_out} of {len(curve)} left out, more than {DROP:g} points below {first:.1f}%")
    if len(kept) == 1:
        notes.append("too few points for a curve: tokens/forward × accuracy of one")
    return Area(area, "; ".join(notes), kept, left_out, top)


def areas(points: Sequence[tuple[str, Point]]) -> dict[str, dict[str, Area]]:
    """AUP of every method by task, over tasks in which text was written: {method: {task: area}}.

    points: each with the name of its method; those stopped early take no part.  y_max is of all points.
    """
    pairs: dict[str, dict[str, list[tuple[float, float] | None]]] = {}  # task -> method -> pairs, None: not known
    for method, point in points:
        if point.stopped is None:
            for task, pair in _pairs(point).items():
                pairs.setdefault(task, {}).setdefault(method, []).append(pair)
    by_method: dict[str, dict[str, Area]] = {}
    for task, methods in pairs.items():
        known = {method: [pair for pair in those if pair is not None] for method, those in methods.items()}
        y_max = max((y for those in known.values() for _, y in those), default=0.0)
        for method, those in known.items():
            area = aup(those, y_max=y_max) if those else Area(None, _UNKNOWN, (), 0, y_max)
            by_method.setdefault(method, {})[task] = area
    return by_method


def as_rows(by_method: Mapping[str, Mapping[str, Area]]) -> list[dict[str, Any]]:
    """Areas as result files hold them, a row a method: mean over tasks, as the leaderboard's, and each task's.

    The mean is None if a task has none.
    """
    rows = []
    for method, tasks in by_method.items():
        values = [area.value for area in tasks.values()]
        known = [value for value in values if value is not None]
        mean = math.fsum(known) / len(known) if known and len(known) == len(values) else None
        rows.append({"method": method, "mean": mean, "tasks": {name: area.to_dict() for name, area in tasks.items()}})
    return rows


def _pairs(point: Point) -> dict[str, tuple[float, float] | None]:
    """A point's tokens per forward and accuracy (percent) on each task in which it wrote text.

    None where they are not known, as of an import, or a backend.
    """
    tasks: dict[str, tuple[float, float] | None] = {}
    for task in dict.fromkeys(sample.task for sample in point.samples):
        samples = [sample for sample in point.samples if sample.task == task]
        written = [sample for sample in samples if sample.written]
        spent = [sample.forwards for sample in written if sample.forwards is not None]
        counted = [sample.tokens for sample in written if sample.tokens is not None]
        if len(spent) < len(written) or len(counted) < len(written):
            tasks[task] = None
            continue
        forwards, tokens = sum(spent), sum(counted)
        if tokens and forwards:
            accuracy = 100 * math.fsum(sample.score for sample in samples) / len(samples)
            tasks[task] = (tokens / forwards, min(100.0, max(0.0, accuracy)))
    return tasks
