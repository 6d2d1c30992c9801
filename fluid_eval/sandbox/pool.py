"""Judging many programs at once: a pool of warden processes, one a CPU, each with a thread that feeds it."""

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

from . import Outcome, Trial
from .files import interpreter_files
from .tiers import remove

HANGS = 120.0
"""Seconds beyond a trial's time-out after which a silent warden is killed: it keeps deadlines itself, and so hangs."""
_ROOT = Path(__file__).resolve().parents[2]


class WardenEnded(OSError):  # noqa: N818
    """A warden process ended without an outcome."""


class WardenProcess:
    """A warden process (see `warden`): one trial at a time. A process that ends is replaced at the next trial."""

    def __init__(self, tier: str) -> None:
        """Raises OSError if the tier cannot be entered."""
        self.tier = tier
        self._process: subprocess.Popen[str] | None = None

    def _open(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="fluid-eval-")  # if we end first, the warden removes it
        environment = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": self._folder, "HOME": self._folder}
        paths = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fluid_eval.sandbox.warden"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env={**environment, "PYTHONPATH": paths}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            self._exchange({"tier": self.tier, "files": asdict(_files()), "folder": self._folder}, HANGS)
        except WardenEnded as error:  # no program has run: the tier is at fault
            raise OSError(str(error)) from error

    def _exchange(self, values: dict[str, object], seconds: float) -> dict[str, str]:
        """Send a message and return the reply. Raises OSError for an error of the warden, WardenEnded if it is gone."""
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
            raise OSError(answer["error"]) if line else WardenEnded("the warden's process ended")
        return answer

    def judge(self, trial: Trial) -> Outcome:
        """Raises OSError if no process can be started, WardenEnded if it ends without an outcome."""
        if self._process is None:
            self._open()
        answer = self._exchange(asdict(trial), trial.timeout + HANGS)
        return Outcome(answer["reason"], answer["detail"], float(answer["seconds"]), self.tier)

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

    def __enter__(self) -> WardenProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_files = functools.cache(interpreter_files)


class JudgePool:
    """Warden processes of one tier. Outcomes are cached: equal trials run once.

    Threads are daemons, so that a process can end while trials are pending.
    """

    def __init__(self, tier: str, workers: int | None = None) -> None:
        """workers: warden processes, by default one a CPU."""
        self.tier = tier
        self.workers = workers or os.cpu_count() or 1
        self._queue: SimpleQueue[tuple[Trial, Future[Outcome]] | None] = SimpleQueue()
        self._outcomes: dict[str, Future[Outcome]] = {}
        self._lock = threading.Lock()
        self.wardens = [WardenProcess(tier) for _ in range(self.workers)]
        self._threads = [threading.Thread(target=self._work, args=(warden,), daemon=True) for warden in self.wardens]
        for thread in self._threads:
            thread.start()

    def submit(self, trial: Trial) -> Future[Outcome]:
        """Queue a trial, unless an equal one was submitted. The future raises RunError if no process can be started."""
        with self._lock:
            key = trial.key
            if key not in self._outcomes:
                self._outcomes[key] = Future()
                self._queue.put((trial, self._outcomes[key]))
            return self._outcomes[key]

    def _work(self, warden: WardenProcess) -> None:
        while (job := self._queue.get()) is not None:
            trial, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._judge(warden, trial))
            except BaseException as error:
                future.set_exception(error)
        warden.close()

    def _judge(self, warden: WardenProcess, trial: Trial) -> Outcome:
        """The outcome of a trial. A warden that ends is given a second try, in a new process."""
        started = time.perf_counter()
        try:
            return warden.judge(trial)
        except OSError:
            try:
                return warden.judge(trial)
            except WardenEnded as error:  # twice: the program ends it
                return Outcome("failed", str(error), time.perf_counter() - started, warden.tier)
            except OSError as error:
                raise RunError(f"a program cannot be judged in {self.tier}: {error}") from error

    def close(self) -> None:
        """Cancel pending trials and end all processes."""
        with self._lock:
            for future in self._outcomes.values():
                future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


@functools.cache
def judges(tier: str) -> JudgePool:
    """This process's pool of a tier, closed at exit."""
    opened = JudgePool(tier)
    atexit.register(opened.close)
    return opened
