"""Taking speed repeats: the answers of one run, or of several in alternation, are generated again and timed.

    turn 0   run A, run B
    turn 1   run B, run A        every other turn in reverse order, against drift of the machine
    turn 2   run A, run B

`results.speed_repeats` has the stored form.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..benchmarks import lm_eval_tasks
from ..common.progress import ProgressBar
from ..common.spec import RunSpec
from ..results import speed_repeats
from ..results.run_folder import Run
from .chunks import Pool, chunks_of

if TYPE_CHECKING:
    from fluid_model.engine.records import Request

    from .answering_lm import AnsweringLM


class RepeatableRun(Protocol):
    """A run with an open folder, whose answers can be generated again (`running.job.Job`)."""

    @property
    def spec(self) -> RunSpec: ...

    @property
    def opened(self) -> Run: ...

    @property
    def lm(self) -> AnsweringLM: ...


def time_in_turns(
    pool: Pool, jobs: Mapping[str, RepeatableRun], asked: Mapping[str, lm_eval_tasks.Asked], count: int
) -> None:
    """Time all answers of these jobs `count` times more, each job once a turn, and store the repeats.

    jobs, asked: jobs and their lm-eval requests, by name. The run folders must be open. A job with a failed request in
    a turn has no repeat of that turn.
    """
    work = {name: jobs[name].lm.to_time(asked[name]) for name in jobs}
    session = secrets.token_hex(6)
    total = count * sum(map(len, work.values()))
    with ProgressBar("timing", total) as bar:
        for turn in range(count):
            for name in list(work)[:: 1 if turn % 2 == 0 else -1]:
                if work[name]:
                    _time(pool, name, jobs[name], work[name], (session, turn), bar)


def _time(
    pool: Pool, name: str, job: RepeatableRun, work: Sequence[Request], turn: speed_repeats.Turn, bar: ProgressBar
) -> None:
    """One repeat of one job."""
    from fluid_model.engine.records import Generation

    seconds: dict[str, float] = {}
    unequal: list[str] = []
    for _, answer in pool.run(chunks_of(pool, name, job.spec, work)):
        bar.advance()
        if isinstance(answer, Generation):
            seconds[answer.key] = answer.seconds
            if list(answer.ids) != job.opened.samples[answer.key]["output_ids"]:
                unequal.append(answer.key)
    if len(seconds) == len(work):
        speed_repeats.append(job.opened.folder, speed_repeats.Repeat(*turn, seconds, sorted(unequal)))
