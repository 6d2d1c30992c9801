"""Speed repeats: answers of one run, or of several in turns, written again for their time (see `repeats`)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..benchmarks import lm_eval_tasks
from ..common.progress import Bar
from ..common.spec import RunSpec
from ..results import speed_repeats
from ..results.run_folder import Run
from .chunks import Pool, chunks_of

if TYPE_CHECKING:
    from fluid_model.engine.records import Request

    from .lm_eval_model import FluidLM


class Timed(Protocol):
    """A run whose folder is open, and what says what it writes."""

    @property
    def spec(self) -> RunSpec: ...

    @property
    def opened(self) -> Run: ...

    @property
    def lm(self) -> FluidLM: ...


def time_in_turns(pool: Pool, jobs: Mapping[str, Timed], asked: Mapping[str, lm_eval_tasks.Asked], count: int) -> None:
    """Write all answers of these jobs `count` times more, each job once a turn, every other turn in reverse order, and
    keep what each took. jobs, asked: by name.

    A job that lost an answer in a turn has no repeat of it. Its run folder must be open.
    """
    work = {name: jobs[name].lm.to_time(asked[name]) for name in jobs}
    session = secrets.token_hex(6)
    total = count * sum(map(len, work.values()))
    with Bar("timing", total) as bar:
        for turn in range(count):
            for name in list(work)[:: 1 if turn % 2 == 0 else -1]:
                if work[name]:
                    _time(pool, name, jobs[name], work[name], (session, turn), bar)


def _time(pool: Pool, name: str, job: Timed, work: Sequence[Request], turn: speed_repeats.Turn, bar: Bar) -> None:
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
