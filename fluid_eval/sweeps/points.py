"""One point of a sweep as the frontier wants it: its settings and what each document scored and cost. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluid_model.settings import check_range

from ..results.metrics import Record, first_scores
from ..results.speed_repeats import Repeat, Turn, tokens_per_second


@dataclass(frozen=True)
class Sample:
    """One document as a point answered it. score: 0 to 1.  tokens: of the answer.  written: False if scored instead."""

    task: str
    doc: int | str
    score: float
    tokens: int
    forwards: int
    seconds: float
    written: bool = True

    def __post_init__(self) -> None:
        check_range("score", self.score, 0, 1)
        for name in ("tokens", "forwards", "seconds"):
            check_range(name, getattr(self, name), 0, math.inf)


@dataclass(frozen=True)
class Point:
    """One choice of settings and the documents it answered. stopped: why it was ended before it had answered all.

    paces: tokens/s of repeats, those of points that took turns under the same name.
    """

    name: str
    settings: Mapping[str, Any]
    samples: Sequence[Sample]
    stopped: str | None = None
    paces: Mapping[Turn, float] = field(default_factory=dict)


def as_point(
    name: str,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    owners: Mapping[str, str],
    *,
    stopped: str | None = None,
    repeats: Sequence[Repeat] = (),
) -> Point:
    """Samples as a frontier wants them: a document's score is that of its task's first metric.

    owners: leaf task -> the task that was asked for, which is what counts as one.  repeats: see `cost`.
    """
    scores = first_scores(records)
    samples = [
        Sample(
            task=owners[record["task"]], doc=record["key"], score=scores[record["key"]],
            tokens=len(record["output_ids"]), forwards=sum(record["trace"]["forwards"].values()),
            seconds=record["seconds"], written=record["finish"] is not None,
        )
        for record in records
        if record["key"] in scores and record["key"].count("/") == 1  # a document's first answer, where it has several
    ]  # fmt: skip
    return Point(
        name, dict(settings), samples, stopped, tokens_per_second([r for r in records if "lost" not in r], repeats)
    )
