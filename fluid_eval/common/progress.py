"""Progress of long work on standard error. On a terminal: bars with samples/s and time left. Elsewhere: nothing for one
run (`ProgressBar`), a line every EVERY seconds for a sweep (`Board`). A caller may take the events instead (`sent_to`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


@dataclass(frozen=True)
class ProgressEvent:
    """How far some work is, in samples; the first event of a run counts those stored before.

    title: writing (answers), scoring (likelihoods), timing (speed repeats) or sweep.
    done, total: samples.  failed: those of them without an answer.
    point: name of the sweep's point that the last sample belongs to, None outside sweeps.
    """

    title: str
    done: int
    total: int
    failed: int = 0
    point: str | None = None


Listener = Callable[[ProgressEvent], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def sent_to(listener: Listener | None) -> Iterator[None]:
    """A context whose progress goes to `listener` and not to standard error. None changes nothing.

    An exception of the listener ends the work; what is answered is stored.
    """
    token = _LISTENER.set(listener or _LISTENER.get())
    try:
        yield
    finally:
        _LISTENER.reset(token)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


class _TerminalBars:
    """A context in which bars are drawn, if standard error is a terminal and no listener takes the events."""

    def __init__(self, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._listener = _LISTENER.get() if shown else None
        self._shown = shown and console.is_terminal and self._listener is None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not self._shown)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class ProgressBar(_TerminalBars):
    """Progress of one run over `total` samples."""

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        super().__init__(shown=shown)
        self._task = self._progress.add_task(title, total=total)
        self._title, self._total, self._done = title, total, 0

    def skip(self, count: int) -> None:
        """Count samples that are stored already."""
        self._progress.update(self._task, completed=count)
        self._done = count
        self._send()

    def advance(self) -> None:
        """Count one more sample."""
        self._progress.advance(self._task)
        self._done += 1
        self._send()

    def _send(self) -> None:
        if self._listener is not None:
            self._listener(ProgressEvent(self._title, self._done, self._total))


EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
MOST_BARS = 16
"""Points with a bar of their own at once, those with the fewest samples done first."""


class Board(_TerminalBars):
    """Progress of a sweep: one bar over all points, one a point. counts: samples done and in all, of each point."""

    def __init__(self, names: Sequence[str], counts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        done = sum(point_done for point_done, _ in counts)
        total = sum(point_total for _, point_total in counts)
        self._all = self._progress.add_task("all points", total=total, completed=done)
        width = max(map(len, names))
        self._tasks = {
            name: self._progress.add_task(
                name.ljust(min(width, 40))[:40], total=of, completed=done_before, visible=False
            )
            for name, (done_before, of) in zip(names, counts, strict=True)
        }
        self._answered = self._failed = 0
        self._done_before, self._total = done, total
        self._started = self._last_update = time.monotonic()

    def advance(self, name: str, *, failed: bool = False) -> None:
        """Count one more sample of a point."""
        self._answered += 1
        self._failed += failed
        self._progress.advance(self._all)
        self._progress.advance(self._tasks[name])
        if self._listener is not None:
            done = self._done_before + self._answered
            self._listener(ProgressEvent("sweep", done, self._total, self._failed, name))
            return
        now = time.monotonic()
        if now - self._last_update > (1.0 if self._shown else EVERY):
            self._last_update = now
            if self._shown:
                self._update_bars()
            else:
                self._print_line(now)

    def stop(self, name: str) -> None:
        """A point stopped early: its missing samples leave the total."""
        task = self._progress.tasks[self._tasks[name]]
        left = int((task.total or 0) - task.completed)
        self._total -= left
        self._progress.update(self._all, total=self._total)
        self._progress.update(self._tasks[name], description=f"{task.description} (ended)", visible=False)

    def _update_bars(self) -> None:
        unfinished = sorted((t for t in self._progress.tasks if not t.finished), key=lambda t: t.completed)
        chosen = {task.id for task in unfinished[:MOST_BARS]} | {self._all}
        for task in self._progress.tasks:
            task.visible = task.id in chosen
        self._progress.update(self._all, description=f"all points, {self._failed} failed")

    def _print_line(self, now: float) -> None:
        speed = self._answered / (now - self._started)
        done = self._done_before + self._answered
        left = int((self._total - done) / speed)
        print(
            f"{done:,} of {self._total:,} samples, {speed:.1f}/s, {self._failed} failed, "
            f"{left // 60}:{left % 60:02} left",
            file=sys.stderr,
        )
