"""A sweep's points under way: what they have answered of each turn, how long it took, what is left."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..benchmarks import lm_eval_tasks
from ..results import speed_repeats
from ..results.run_folder import Record
from ..running.job import Job
from .grid import PlannedPoint
from .points import Point, as_point

if TYPE_CHECKING:
    from ..running.worker import Work


@dataclass
class Under:
    """A point under way. asked: all of it.  work: what it has not answered, by turn.  stopped: why it was ended early.
    paces: tokens/s of its turns in this session, in which all points answered the same documents.
    """

    planned: PlannedPoint
    job: Job
    asked: lm_eval_tasks.Asked
    work: dict[int, list[Work]]
    stopped: str | None = None
    paces: dict[speed_repeats.Turn, float] = field(default_factory=dict)

    def note_pace(self, turn: int, answers: Sequence[tuple[int, float]]) -> None:
        """Note how fast a turn was. answers: tokens and seconds of each."""
        tokens, seconds = sum(n for n, _ in answers), math.fsum(s for _, s in answers)
        if tokens and seconds > 0:
            self.paces["", turn] = tokens / seconds

    def timed(self, count: int) -> bool:
        """Whether it was timed that often, or writes nothing that could be."""
        writes = any(instance.request_type == "generate_until" for instance in self.asked)
        return not writes or speed_repeats.enough(speed_repeats.read(self.job.opened.folder), count)

    @property
    def name(self) -> str:
        return self.planned.name


def point_of(under: Under, records: list[Record]) -> Point:
    """A point with what it answered, and how long that took each time."""
    tasks = under.job.ready.tasks
    owners = {leaf: name for name in under.planned.spec.tasks for leaf in lm_eval_tasks.members(tasks, name)}
    held = speed_repeats.read(under.job.opened.folder)
    return as_point(
        under.name, under.planned.settings, records, owners, stopped=under.stopped, repeats=held
    )  # fmt: skip


def held_share(under: Under, turns: int) -> float:
    """The share of the documents a stopped point has answered."""
    done = [turn for turn in range(turns) if not left(under, turn)]
    return len(done) / turns


def left(under: Under, turn: int) -> bool:
    """Whether a turn's work is not all answered."""
    held = under.job.opened.samples
    return any(item.key not in held for item in under.work.get(turn, []))


def by_turn(
    point: PlannedPoint, job: Job, asked: lm_eval_tasks.Asked, documents: Mapping[str, int], turns: int
) -> dict[int, list[Work]]:
    """What a point has not answered, by the turn its document is in. documents: how many each task has."""
    ends = {
        name: [_count(point, count, (turn + 1) / turns) for turn in range(turns)] for name, count in documents.items()
    }
    found: dict[int, list[Work]] = defaultdict(list)
    for item in job.lm.missing(asked):
        task, doc = item.key.split("/")[:2]
        found[next(turn for turn, end in enumerate(ends[task]) if int(doc) < end)].append(item)
    return dict(found)


def _count(point: PlannedPoint, documents: int, share: float) -> int:
    """Documents of a task that lie in that share of a run."""
    limit = lm_eval_tasks.limit_for(point.spec, share)
    if limit is None:
        return documents
    return min(documents, math.ceil(documents * limit) if limit < 1 else int(limit))
