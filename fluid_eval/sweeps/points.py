"""One point of a sweep: its settings, and the score and cost of each document. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluid_model.settings import check_range

from ..results.metrics import Record, first_scores
from ..results.sample_records import forwards_of, tokens_of
from ..results.speed_repeats import Repeat, Turn, tokens_per_second


@dataclass(frozen=True)
class ScoredDocument:
    """One document's score (0 to 1) and cost at a point.

    tokens: of the answer.  forwards, seconds: it took. None where unknown.
    written: False where choices were scored by log-likelihood instead of generated.
    """

    task: str
    doc: int | str
    score: float
    tokens: int | None
    forwards: int | None
    seconds: float | None
    written: bool = True

    def __post_init__(self) -> None:
        check_range("score", self.score, 0, 1)
        for name in ("tokens", "forwards", "seconds"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf)


@dataclass(frozen=True)
class Point:
    """One choice of settings and the documents it answered.

    stopped: the reason why it was stopped early, before it had answered all documents.
    method: its decoder, with or without verification.
    paces: tokens/s of each repeat; repeats that points took in turns have the same key.
    """

    name: str
    settings: Mapping[str, Any]
    samples: Sequence[ScoredDocument]
    stopped: str | None = None
    paces: Mapping[Turn, float] = field(default_factory=dict)
    method: str = ""


_BACKEND = "backend "
"""Begins the method of a point whose answers another program writes."""


def backend_method(name: str) -> str:
    """A backend in a legend."""
    return _BACKEND + name


def is_of_backend(method: str) -> bool:
    """Whether a method is a backend."""
    return method.startswith(_BACKEND)


def method_of(name: str, verify: bool | None) -> str:
    """A decoder in a legend: its name and whether it verifies. verify: None where it cannot do either."""
    return name + ("" if verify is None else ", verified" if verify else ", unverified")


def as_point(
    name: str,
    settings: Mapping[str, Any],
    records: Sequence[Record],
    owners: Mapping[str, str],
    *,
    stopped: str | None = None,
    repeats: Sequence[Repeat] = (),
    method: str = "",
) -> Point:
    """A point from a run's sample records. A document's score is that of its task's first metric.

    owners: leaf task -> the requested task (or group), over which scores are averaged.  repeats: of the run's timing.
    """
    scores = first_scores(records)
    samples = [
        ScoredDocument(
            task=owners[record["task"]], doc=record["key"], score=scores[record["key"]],
            tokens=tokens_of(record), forwards=forwards_of(record),
            seconds=record["seconds"], written=record["finish"] is not None,
        )
        for record in records
        if record["key"] in scores and record["key"].count("/") == 1  # the first of several answers
    ]  # fmt: skip
    return Point(
        name,
        dict(settings),
        samples,
        stopped,
        tokens_per_second([r for r in records if "lost" not in r], repeats),
        method,
    )
