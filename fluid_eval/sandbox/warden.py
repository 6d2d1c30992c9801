"""One place where programs are judged: a small process that starts a jail for each program and one for the judge, hands
messages from one to the other, watches the clock, and reports what the judge said.

    python -m fluid_eval.sandbox.warden        trials and verdicts, a JSON line each, on standard input and output
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
"""Seconds that tests may take beyond the program's."""
WATCH = 0.05
"""Seconds between looks at a private folder that has no limit of its own."""
LARGEST = 8 << 20
"""Bytes of an answer."""


def _code(name: str) -> CodeType:
    file = Path(__file__).with_name(name)
    return compile(file.read_text(encoding="utf-8"), name, "exec", optimize=2)


class Late(Exception):  # noqa: N818
    """The clock ran out."""


class Gone(Exception):  # noqa: N818
    """The other end is closed, or sends what nobody asked for."""


class NotUp(Exception):  # noqa: N818
    """An interpreter that ended before the program had begun."""


class Watch:
    """Looks at a program's folder by the clock, whatever is said or awaited meanwhile."""

    def __init__(self) -> None:
        self._jailed: Jailed | None = None
        self._due = 0.0

    def on(self, jailed: Jailed | None) -> None:
        """Watch this one from now on."""
        self._jailed, self._due = jailed, 0.0

    def look(self, *, now: bool = False) -> None:
        """Raises Gone where the folder holds too much. now: whether or not it is time for it."""
        if self._jailed is None or not (now or time.monotonic() >= self._due):
            return
        if self._jailed.overfull():
            raise Gone("the program filled its folder")
        self._due = time.monotonic() + WATCH  # from its end: a slow look leaves time for others


class Line:
    """Length-prefixed messages to and from a jailed interpreter, by a deadline (of time.monotonic)."""

    def __init__(self, jailed: Jailed, watch: Watch) -> None:
        self._jailed, self._watch = jailed, watch
        self._left = b""
        os.set_blocking(jailed.stdin, False)
        os.set_blocking(jailed.stdout, False)

    def send(self, data: bytes, deadline: float) -> None:
        """Raises Gone or Late."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._jailed.stdin, rest) :]
            except BlockingIOError:
                self._wait(self._jailed.stdin, select.POLLOUT, deadline)
            except OSError as error:
                raise Gone from error

    def receive(self, deadline: float) -> bytes:
        """The next message. Raises Gone or Late."""
        message = self._message(deadline)
        self._watch.look(now=True)
        return message

    def _message(self, deadline: float) -> bytes:
        size = int.from_bytes(self._exactly(4, deadline), "big")
        if size > LARGEST:
            raise Gone("an answer is too large")
        return self._exactly(size, deadline)

    def _wait(self, number: int, what: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(number, what)
        while (left := deadline - time.monotonic()) > 0:
            self._watch.look()
            if poll.poll(min(left, WATCH) * 1000):
                return
        raise Late

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts, held = [self._left], len(self._left)
        while held < size:
            self._watch.look()
            try:
                part = os.read(self._jailed.stdout, 1 << 16)
            except BlockingIOError:
                self._wait(self._jailed.stdout, select.POLLIN, deadline)
                continue
            except OSError as error:
                raise Gone from error
            if not part:
                raise Gone("the program ended its process")
            parts.append(part)
            held += len(part)
            if time.monotonic() > deadline:
                raise Late
        data = b"".join(parts)
        self._left = data[size:]
        return data[:size]


class Warden:
    """Judges one program at a time. The judge's interpreter serves many; it is replaced when it hangs. A program's
    serves one, and comes up while the one before is judged.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._child, self._judges = (marshal.dumps(_code(name)) for name in ("child.py", "judge.py"))
        self._next: Jailed | None = None
        self._judge: Jailed | None = None
        self._to_judge: Line | None = None
        self._watch = Watch()

    def judge(self, program: str, setup: str, tests: str, entry: str, timeout: float) -> tuple[str, str]:
        """(passed, failed or timed out; why). Raises OSError where no jail can be started; whatever happens after that
        is the verdict.
        """
        job = marshal.dumps((setup, tests, entry))
        try:
            try:
                names = self._asked(job)
            except Gone:  # it ended after its last verdict, which is no fault of this program
                names = self._asked(job)
            code = self._child + marshal.dumps((program, names))
            try:
                return self._run(code, timeout)
            except NotUp:  # it ended before it had run anything of the program's
                return self._run(code, timeout)
        except Late:
            self._end_judge()
            return "timed out", ""
        except (Gone, NotUp) as error:
            self._end_judge()
            return "failed", str(error) or "the judge ended"

    def _asked(self, job: bytes) -> list[str]:
        """What tests want of the program. A judge that fails is ended. Raises Gone or Late."""
        deadline = time.monotonic() + START
        judge = self._open_judge()
        try:
            judge.send(job, deadline)
            return [str(name) for name in json.loads(judge.receive(deadline)[1:])]
        except Gone:
            self._end_judge()
            raise

    def _run(self, code: bytes, timeout: float) -> tuple[str, str]:
        """Raises OSError where no jail can be started, NotUp, Late, or Gone where the judge ends."""
        jailed, self._next = self._next or self._tier.start(processes=False), None
        self._watch.on(jailed)
        try:
            verdict = self._judged(Line(jailed, self._watch), code, timeout)
        except (NotUp, Late, Gone):
            raise
        except Exception as error:  # such as an OSError of looking at what the program has made
            self._end_judge()
            verdict = "failed", f"its judge gave up: {error or type(error).__name__}"
        finally:
            self._watch.on(None)
            with suppress(Exception):  # what is left goes with the warden's own folder
                jailed.end()
        return verdict

    def _judged(self, program: Line, code: bytes, timeout: float) -> tuple[str, str]:
        judge = self._open_judge()
        deadline = time.monotonic() + START
        over = None
        try:
            program.send(code, deadline)
            with suppress(OSError):  # then it is started when it is needed, or not at all
                self._next = self._tier.start(processes=False)
            program.receive(deadline)  # it is up
        except Gone as error:
            raise NotUp(str(error) or "the program ended its process") from error
        sent = 0
        deadline = time.monotonic() + timeout
        try:
            answer = program.receive(deadline)
        except Gone as error:
            over = str(error) or "the program ended its process"
        while True:
            data = json.dumps({"over": over}).encode() if over else answer
            judge.send(len(data).to_bytes(4, "big") + data, deadline + GRACE)
            sent += 1
            message = judge.receive(deadline + GRACE)
            if message[:1] == b"v":
                passed, reason, taken = json.loads(message[1:])
                if taken != sent:  # what it left unread would be taken for the next program's answer
                    self._end_judge()
                return "passed" if passed else "failed", reason
            if over is None:
                try:
                    program.send(message[1:], deadline)
                    answer = program.receive(deadline)
                except Gone as error:
                    over = str(error) or "the program ended its process"

    def _open_judge(self) -> Line:
        if self._to_judge is None:
            self._judge = self._tier.start(processes=True)
            self._to_judge = Line(self._judge, self._watch)
            self._to_judge.send(self._judges, time.monotonic() + START)
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
    """The first line says which tier and which files; each further one is a trial. Answers with a JSON line each."""
    head = json.loads(next(requests))
    try:
        tier = tier_named(head["tier"], Files(**head["files"]))
        tier.settle()
    except (OSError, ImportError) as error:
        _tell({"error": str(error)})
        return
    _tell({})
    warden = Warden(tier)
    try:
        for line in requests:
            started = time.perf_counter()
            try:
                reason, detail = warden.judge(**json.loads(line))
            except OSError as error:
                _tell({"error": str(error)})
                return
            _tell({"reason": reason, "detail": detail, "seconds": time.perf_counter() - started})
    finally:
        warden.close()
        remove(head["folder"])


def _tell(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans below become ours, to be reaped
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: it reaches us when whoever asks ends
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    serve(iter(sys.stdin))
