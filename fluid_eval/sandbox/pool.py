"""Judging many programs at once, in small processes of their own beside whatever else goes on."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from fluid_model.common.errors import RunError

from . import Trial, Verdict
from .files import interpreter_files
from .tiers import remove

HANGS = 120.0
"""Seconds beyond a trial's own without a verdict after which a warden, which has clocks of its own, must be broken."""
_ROOT = Path(__file__).resolve().parents[2]


class Ended(OSError):  # noqa: N818
    """A warden that is gone without a verdict."""


class Place:
    """A warden's process (see warden.py), one trial at a time; made anew if it ends."""

    def __init__(self, tier: str) -> None:
        """Raises OSError if the tier cannot be entered."""
        self.tier = tier
        self._process: subprocess.Popen[str] | None = None

    def _open(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="fluid-eval-")  # the warden's to remove where we end first
        kept = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": self._folder, "HOME": self._folder}
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fluid_eval.sandbox.warden"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**kept, "PYTHONPATH": paths}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            self._exchange({"tier": self.tier, "files": asdict(_files()), "folder": self._folder}, HANGS)
        except Ended as error:  # with no program near it
            raise OSError(str(error)) from error

    def _exchange(self, values: dict[str, object], seconds: float) -> dict[str, str]:
        """What the warden answers. Raises OSError where it cannot do what it is asked for, Ended where it is gone."""
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(values) + "\n")
            process.stdin.flush()
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            process.kill()
        line = process.stdout.readline()
        answer = dict(json.loads(line)) if line else {}
        if not line or "error" in answer:
            self.close()
            raise OSError(answer["error"]) if line else Ended("the warden's process ended")
        return answer

    def judge(self, trial: Trial) -> Verdict:
        """Raises OSError if no process can be started, Ended if it is gone before it has a verdict."""
        if self._process is None:
            self._open()
        answer = self._exchange(asdict(trial), trial.timeout + HANGS)
        return Verdict(answer["reason"], answer["detail"], float(answer["seconds"]), self.tier)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            assert self._process.stdout
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            remove(self._folder)
        self._process = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_files = functools.cache(interpreter_files)


class Judges:
    """Places in one tier, and the verdicts they gave: a trial is held once, however often it is asked for.

    Threads are daemons: a process that ends does not wait for trials nobody asks about any more.
    """

    def __init__(self, tier: str, workers: int | None = None) -> None:
        """workers: places, by default one a CPU."""
        self.tier = tier
        self.workers = workers or os.cpu_count() or 1
        self._queue: SimpleQueue[tuple[Trial, Future[Verdict]] | None] = SimpleQueue()
        self._verdicts: dict[str, Future[Verdict]] = {}
        self._lock = threading.Lock()
        self.places = [Place(tier) for _ in range(self.workers)]
        self._threads = [threading.Thread(target=self._work, args=(place,), daemon=True) for place in self.places]
        for thread in self._threads:
            thread.start()

    def submit(self, trial: Trial) -> Future[Verdict]:
        """Have a trial held, if it is not yet. The future raises RunError if no process can be started for it."""
        with self._lock:
            key = trial.key
            if key not in self._verdicts:
                self._verdicts[key] = Future()
                self._queue.put((trial, self._verdicts[key]))
            return self._verdicts[key]

    def _work(self, place: Place) -> None:
        while (job := self._queue.get()) is not None:
            trial, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._judged(place, trial))
            except BaseException as error:
                future.set_exception(error)
        place.close()

    def _judged(self, place: Place, trial: Trial) -> Verdict:
        started = time.perf_counter()
        try:
            return place.judge(trial)
        except OSError:  # its process ended, whatever ended it: once more, in a new one
            try:
                return place.judge(trial)
            except Ended as error:  # again: the program is what ends it
                return Verdict("failed", str(error), time.perf_counter() - started, place.tier)
            except OSError as error:
                raise RunError(f"a program cannot be judged in {self.tier}: {error}") from error

    def close(self) -> None:
        """Give up what has not begun and end all processes."""
        with self._lock:
            for future in self._verdicts.values():
                future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


@functools.cache
def judges(tier: str) -> Judges:
    """This process's judges in a tier, ended with it."""
    opened = Judges(tier)
    atexit.register(opened.close)
    return opened
