"""Points of a running sweep: what they have answered of each document batch, how fast, and what is unanswered.

A sweep cuts each task's documents into batches, the same for all points: batch 0 of 8 is the first eighth of each task.
All points answer a batch before any of them goes on to the next, so that they compare at every time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..benchmarks import lm_eval_tasks
from ..results import speed_repeats
from ..results.metrics import total
from ..results.run_folder import Record
from ..running.job import Job
from .grid import PlannedPoint
from .points import Point, as_point, backend_method, method_of

if TYPE_CHECKING:
    from ..running.worker import Work


@dataclass
class PointInProgress:
    """A point of a running sweep.

    asked: its lm-eval requests.  work: the unanswered ones, by document batch.
    stopped: the reason why it was stopped early, None otherwise.
    paces: tokens/s of each batch in this session, over which all points answered the same documents.
    """

    planned: PlannedPoint
    job: Job
    asked: lm_eval_tasks.Asked
    work: dict[int, list[Work]]
    stopped: str | None = None
    paces: dict[speed_repeats.Turn, float] = field(default_factory=dict)

    def note_pace(self, batch: int, answers: Sequence[tuple[int | None, float]]) -> None:
        """Record the speed of a document batch, where it is known. answers: (tokens, seconds) of each."""
        tokens = total(n for n, _ in answers)
        seconds = math.fsum(s for _, s in answers)
        if tokens and seconds > 0:
            self.paces["", batch] = tokens / seconds

    def timed(self, count: int) -> bool:
        """Whether it has `count` speed repeats, or nothing that is timed again: no text, or a backend's."""
        if self.is_backend:
            return True
        generates = any(instance.request_type == "generate_until" for instance in self.asked)
        return not generates or speed_repeats.enough(speed_repeats.read(self.job.opened.folder), count)

    def answered_share(self, batches: int) -> float:
        """The share of its document batches that are answered in full."""
        return sum(not self._is_unanswered(batch) for batch in range(batches)) / batches

    def _is_unanswered(self, batch: int) -> bool:
        samples = self.job.opened.samples
        return any(item.key not in samples for item in self.work.get(batch, []))

    def to_point(self, records: list[Record]) -> Point:
        """The point with these scored records and its speed repeats."""
        tasks = self.job.ready.tasks
        owners = {leaf: name for name in self.planned.spec.tasks for leaf in lm_eval_tasks.members(tasks, name)}
        repeats = speed_repeats.read(self.job.opened.folder)
        return as_point(
            self.name, self.planned.settings, records, owners, stopped=self.stopped, repeats=repeats,
            method=self.method,
        )  # fmt: skip

    @property
    def is_backend(self) -> bool:
        """Whether another program writes its answers."""
        return self.planned.spec.backend is not None

    @property
    def method(self) -> str:
        """Its decoder, with or without verification, or its backend."""
        if self.is_backend:
            return backend_method(self.planned.spec.writer)
        decoder = self.planned.spec.decoder
        return method_of(decoder.name, getattr(decoder, "verify", None))

    @property
    def model_and_method(self) -> str:
        """What its AUP is of."""
        return f"{Path(self.planned.spec.model.path.rstrip('/')).name}, {self.method}"

    @property
    def name(self) -> str:
        return self.planned.name


def unanswered_by_batch(
    point: PlannedPoint, job: Job, asked: lm_eval_tasks.Asked, documents: Mapping[str, int], batches: int
) -> dict[int, list[Work]]:
    """A point's unanswered requests, by the document batch they belong to. documents: how many each task has."""
    # of each task: the document behind the last of each batch
    ends = {
        task: [_documents(point, count, (batch + 1) / batches) for batch in range(batches)]
        for task, count in documents.items()
    }
    unanswered: dict[int, list[Work]] = defaultdict(list)
    for item in job.lm.missing(asked):
        task, document = item.key.split("/")[:2]
        batch = next(batch for batch, end in enumerate(ends[task]) if int(document) < end)
        unanswered[batch].append(item)
    return dict(unanswered)


def _documents(point: PlannedPoint, documents: int, share: float) -> int:
    """Number of a task's documents in a share of a run, the run's limit applied."""
    limit = lm_eval_tasks.limit_for(point.spec, share)
    if limit is None:
        return documents
    return min(documents, math.ceil(documents * limit) if limit < 1 else int(limit))
