"""Progress on long work: bars with samples/s and time left on a terminal; elsewhere nothing, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


class _Shown:
    """Bars while it is entered, where standard error is a terminal."""

    def __init__(self, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._shown = shown and console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not self._shown)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Bar(_Shown):
    """One piece of work of `total` samples."""

    def __init__(self, title: str, total: int, *, shown: bool = True) -> None:
        super().__init__(shown=shown)
        self._task = self._progress.add_task(title, total=total)

    def skip(self, count: int) -> None:
        """Samples that need no work."""
        self._progress.update(self._task, completed=count)

    def advance(self) -> None:
        """One more sample is done."""
        self._progress.advance(self._task)


EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
MOST_BARS = 16
"""Points a terminal shows at once: those that are furthest from done."""


class Board(_Shown):
    """Many pieces of work at once: one bar over all, one each. counts: samples held and in all, of each.

    Without a terminal it writes a line every EVERY seconds.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        done, total = (sum(column) for column in zip(*counts, strict=True))
        self._all = self._progress.add_task("all points", total=total, completed=done)
        width = max(map(len, names))
        self._tasks = {
            name: self._progress.add_task(name.ljust(min(width, 40))[:40], total=of, completed=held, visible=False)
            for name, (held, of) in zip(names, counts, strict=True)
        }
        self._answered = self._failed = 0
        self._held, self._total = done, total
        self._started = self._told = time.monotonic()

    def advance(self, name: str, *, failed: bool = False) -> None:
        """A point has one more sample."""
        self._answered += 1
        self._failed += failed
        self._progress.advance(self._all)
        self._progress.advance(self._tasks[name])
        now = time.monotonic()
        if now - self._told > (1.0 if self._shown else EVERY):
            self._told = now
            self._tell(now)

    def stop(self, name: str) -> None:
        """A point was ended early."""
        task = self._progress.tasks[self._tasks[name]]
        left = int((task.total or 0) - task.completed)
        self._total -= left
        self._progress.update(self._all, total=self._total)
        self._progress.update(self._tasks[name], description=f"{task.description} (ended)", visible=False)

    def _tell(self, now: float) -> None:
        if self._shown:
            going = sorted((t for t in self._progress.tasks if not t.finished), key=lambda t: t.completed)
            chosen = {task.id for task in going[:MOST_BARS]} | {self._all}
            for task in self._progress.tasks:
                task.visible = task.id in chosen
            self._progress.update(self._all, description=f"all points, {self._failed} failed")
            return
        speed = self._answered / (now - self._started)
        done = self._held + self._answered
        left = int((self._total - done) / speed)
        print(
            f"{done:,} of {self._total:,} samples, {speed:.1f}/s, {self._failed} failed, "
            f"{left // 60}:{left % 60:02} left",
            file=sys.stderr,
        )
