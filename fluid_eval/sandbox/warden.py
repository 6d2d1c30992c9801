"""The warden: a process that judges programs, one at a time.

    python -m fluid_eval.sandbox.warden        trials in, outcomes out, a JSON line each

        pool ──trial──▶ warden ──▶ judge's jail      job: setup, tests, entry    ──▶ names wanted
                        │    ──▶ program's jail    program, names               ──▶ values
                        │    judge ──call──▶ program, program ──answer──▶ judge   until the verdict
        pool ◀─outcome─┘

It starts a jail for each program and one judge for many, relays their messages, enforces deadlines and the size of the
program's folder. The judge's verdict alone decides whether a program passed.
"""

from __future__ import annotations

import ctypes
import json
import marshal
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

from .files import Files
from .ladder import tier_named
from .tiers import Jailed, Tier, remove

START = 20.0
"""Seconds that an interpreter may take to come up."""
GRACE = 1.0
"""Seconds that tests may take beyond the program's time-out."""
WATCH = 0.05
"""Seconds between checks of a private folder without a file system limit."""
LARGEST = 8 << 20
"""Bytes of an answer at most."""


def _code(name: str) -> CodeType:
    file = Path(__file__).with_name(name)
    return compile(file.read_text(encoding="utf-8"), name, "exec", optimize=2)


class DeadlineExceeded(Exception):  # noqa: N818
    """A deadline passed."""


class ChannelClosed(Exception):  # noqa: N818
    """The other end closed its pipe or broke the rules: an answer too large, a folder too full."""


class StartFailed(Exception):  # noqa: N818
    """An interpreter ended before its program began."""


class FolderWatch:
    """Checks the size of a program's folder every WATCH seconds, whatever the warden waits for."""

    def __init__(self) -> None:
        self._jailed: Jailed | None = None
        self._due = 0.0

    def on(self, jailed: Jailed | None) -> None:
        """Watch this jail from now on; None for no jail."""
        self._jailed, self._due = jailed, 0.0

    def check(self, *, now: bool = False) -> None:
        """Raises ChannelClosed if the folder is too full. now: check even if none is due."""
        if self._jailed is None or not (now or time.monotonic() >= self._due):
            return
        if self._jailed.overfull():
            raise ChannelClosed("the program filled its folder")
        self._due = time.monotonic() + WATCH  # counted from the end of a check, which may be slow


class JailChannel:
    """Length-prefixed messages to and from a jailed interpreter, with deadlines (of time.monotonic)."""

    def __init__(self, jailed: Jailed, watch: FolderWatch) -> None:
        self._jailed, self._watch = jailed, watch
        self._left = b""
        os.set_blocking(jailed.stdin, False)
        os.set_blocking(jailed.stdout, False)

    def send(self, data: bytes, deadline: float) -> None:
        """Raises ChannelClosed or DeadlineExceeded."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._jailed.stdin, rest) :]
            except BlockingIOError:
                self._wait(self._jailed.stdin, select.POLLOUT, deadline)
            except OSError as error:
                raise ChannelClosed from error

    def receive(self, deadline: float) -> bytes:
        """The next message. Raises ChannelClosed or DeadlineExceeded."""
        message = self._message(deadline)
        self._watch.check(now=True)
        return message

    def _message(self, deadline: float) -> bytes:
        size = int.from_bytes(self._exactly(4, deadline), "big")
        if size > LARGEST:
            raise ChannelClosed("an answer is too large")
        return self._exactly(size, deadline)

    def _wait(self, number: int, what: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(number, what)
        while (left := deadline - time.monotonic()) > 0:
            self._watch.check()
            if poll.poll(min(left, WATCH) * 1000):
                return
        raise DeadlineExceeded

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts, size_read = [self._left], len(self._left)
        while size_read < size:
            self._watch.check()
            try:
                part = os.read(self._jailed.stdout, 1 << 16)
            except BlockingIOError:
                self._wait(self._jailed.stdout, select.POLLIN, deadline)
                continue
            except OSError as error:
                raise ChannelClosed from error
            if not part:
                raise ChannelClosed("the program ended its process")
            parts.append(part)
            size_read += len(part)
            if time.monotonic() > deadline:
                raise DeadlineExceeded
        data = b"".join(parts)
        self._left = data[size:]
        return data[:size]


class Warden:
    """Judges one program at a time.

    The judge's interpreter serves many programs and is replaced when it fails. A program's interpreter serves one, and
    starts while the one before is judged.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._child_code = marshal.dumps(_code("child.py"))
        self._judge_code = marshal.dumps(_code("judge.py"))
        self._next: Jailed | None = None
        self._judge: Jailed | None = None
        self._to_judge: JailChannel | None = None
        self._watch = FolderWatch()

    def judge(self, program: str, setup: str, tests: str, entry: str, timeout: float) -> tuple[str, str]:
        """Reason (passed, failed or timed out) and detail of the outcome. Raises OSError if no jail can be started."""
        job = marshal.dumps((setup, tests, entry))
        try:
            # 1) names that the tests want of the program
            try:
                names = self._names_wanted(job)
            except ChannelClosed:  # the judge ended after its last verdict: no fault of this program
                names = self._names_wanted(job)
            # 2) the program and its tests
            code = self._child_code + marshal.dumps((program, names))
            try:
                return self._run(code, timeout)
            except StartFailed:  # nothing of the program has run yet
                return self._run(code, timeout)
        except DeadlineExceeded:
            self._end_judge()
            return "timed out", ""
        except (ChannelClosed, StartFailed) as error:
            self._end_judge()
            return "failed", str(error) or "the judge ended"

    def _names_wanted(self, job: bytes) -> list[str]:
        """Names that the tests want of the program. Raises DeadlineExceeded, or ChannelClosed with the judge ended."""
        deadline = time.monotonic() + START
        judge = self._open_judge()
        try:
            judge.send(job, deadline)
            return [str(name) for name in json.loads(judge.receive(deadline)[1:])]
        except ChannelClosed:
            self._end_judge()
            raise

    def _run(self, code: bytes, timeout: float) -> tuple[str, str]:
        """Reason and detail of the program's outcome.

        Raises OSError if no jail can be started, StartFailed, DeadlineExceeded, or ChannelClosed if the judge ends.
        """
        jailed, self._next = self._next or self._tier.start(processes=False), None
        self._watch.on(jailed)
        try:
            outcome = self._relay(JailChannel(jailed, self._watch), code, timeout)
        except (StartFailed, DeadlineExceeded, ChannelClosed):
            raise
        except Exception as error:  # such as an OSError from the program's files
            self._end_judge()
            outcome = "failed", f"its judge gave up: {error or type(error).__name__}"
        finally:
            self._watch.on(None)
            with suppress(Exception):  # files it leaves are removed with the warden's own folder
                jailed.end()
        return outcome

    def _relay(self, program: JailChannel, code: bytes, timeout: float) -> tuple[str, str]:
        """Relay calls and answers between judge and program until the verdict. Reason and detail of the outcome."""
        judge = self._open_judge()
        # 1) start the program, and meanwhile the next interpreter
        deadline = time.monotonic() + START
        try:
            program.send(code, deadline)
            with suppress(OSError):  # then it starts when it is needed
                self._next = self._tier.start(processes=False)
            program.receive(deadline)  # its interpreter is up
        except ChannelClosed as error:
            raise StartFailed(str(error) or "the program ended its process") from error
        # 2) its first answer: the names wanted
        deadline = time.monotonic() + timeout
        failure = None
        try:
            answer = program.receive(deadline)
        except ChannelClosed as error:
            failure = str(error) or "the program ended its process"
        # 3) the judge reads each answer, and sends the next call or the verdict
        sent = 0
        while True:
            data = json.dumps({"over": failure}).encode() if failure else answer
            judge.send(len(data).to_bytes(4, "big") + data, deadline + GRACE)
            sent += 1
            message = judge.receive(deadline + GRACE)
            if message[:1] == b"v":
                passed, reason, received = json.loads(message[1:])
                if received != sent:  # an unread answer would count for the next program
                    self._end_judge()
                return "passed" if passed else "failed", reason
            if failure is None:
                try:
                    program.send(message[1:], deadline)
                    answer = program.receive(deadline)
                except ChannelClosed as error:
                    failure = str(error) or "the program ended its process"

    def _open_judge(self) -> JailChannel:
        if self._to_judge is None:
            self._judge = self._tier.start(processes=True)
            self._to_judge = JailChannel(self._judge, self._watch)
            self._to_judge.send(self._judge_code, time.monotonic() + START)
        return self._to_judge

    def _end_judge(self) -> None:
        if self._judge is not None:
            with suppress(Exception):
                self._judge.end()
        self._judge = self._to_judge = None

    def close(self) -> None:
        """End all interpreters."""
        self._end_judge()
        if self._next is not None:
            with suppress(Exception):
                self._next.end()
            self._next = None


def serve(requests: Iterator[str]) -> None:
    """Answer requests with a JSON line each. The first names tier and files; each further one is a trial."""
    head = json.loads(next(requests))
    try:
        tier = tier_named(head["tier"], Files(**head["files"]))
        tier.settle()
    except (OSError, ImportError) as error:
        _reply({"error": str(error)})
        return
    _reply({})
    warden = Warden(tier)
    try:
        for line in requests:
            started = time.perf_counter()
            try:
                reason, detail = warden.judge(**json.loads(line))
            except OSError as error:
                _reply({"error": str(error)})
                return
            _reply({"reason": reason, "detail": detail, "seconds": time.perf_counter() - started})
    finally:
        warden.close()
        remove(head["folder"])


def _reply(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            36, 1, 0, 0, 0
        )  # PR_SET_CHILD_SUBREAPER: orphaned descendants become our children, to be reaped
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: sent to us when our parent ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    serve(iter(sys.stdin))
