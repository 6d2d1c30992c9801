"""Choice of the isolation tier: each is tested on this machine with a program that attempts forbidden operations."""

from __future__ import annotations

import functools
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError

from . import Trial
from .tiers import DISK, FILE, LADDER, LIMITS, Tier, Unsafe

WAYS_OUT = (
    f"use Linux (elsewhere in a container or virtual machine) with one of: {', '.join(tier.needs for tier in LADDER)}; "
    f"or pass {Unsafe.needs} to run it with limits only"
)
ATTEMPTS = f"""
import os, resource, socket

def attempts(secret, port, pid, network):
    done = []
    def attempt(name, call):
        try:
            if call() is not False:
                done.append(name)
        except (OSError, MemoryError, ValueError):
            pass
    def processes():
        for _ in range(80):
            if not os.fork():
                os._exit(0)
    def opening():
        s = socket.socket()
        try:
            s.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", port))
        except OSError:
            pass
        s.send(b"x")
    def listening():
        s = socket.socket()
        s.listen()
        return s.getsockopt(socket.SOL_SOCKET, 71, 8) == network
    def first():
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    attempt("read a file", lambda: open(secret).read())
    attempt("write a file", lambda: open(secret, "a"))
    attempt("change a file's mode", lambda: os.chmod(secret, 0o600))
    attempt("change its root", lambda: os.chroot("/"))
    attempt("make a file", lambda: open(secret + ".new", "w"))
    attempt("list the file system", lambda: "proc" in os.listdir("/"))
    attempt("read another process", lambda: open(f"/proc/{{pid}}/environ", "rb").read())
    attempt("signal another process", lambda: os.kill(pid, 0))
    attempt("read the environment", lambda: bool(set(os.environ) - {{"PWD", "LC_CTYPE"}}))
    attempt("connect to loopback", lambda: socket.create_connection(("127.0.0.1", port), 1))
    attempt("connect to loopback by many paths", lambda: socket.socket(type=1, proto=262).connect(("127.0.0.1", port)))
    attempt("connect to loopback while it sends", opening)
    attempt("listen where others hear it", listening)
    attempt("limit another process", lambda: resource.prlimit(pid, 7, resource.prlimit(pid, 7)))
    attempt("slow another process", lambda: os.setpriority(0, pid, os.getpriority(0, pid)))
    attempt("run before all others", first)
    attempt("make processes", processes)
    attempt("take memory", lambda: bytearray({2 * LIMITS["AS"]}))
    attempt("write a large file", lambda: open("large", "wb", 0).write(bytes({2 * FILE})) > {FILE})
    return done

def fill():
    for n in range({2 * DISK // FILE}):
        with open(str(n), "wb") as file:
            file.write(bytes({FILE}))
"""
"""The test program: operations that must all fail. Each is harmless if it succeeds."""


@dataclass(frozen=True)
class IsolationHere:
    """Isolation on this machine. name: the strongest tier that holds, or None.  failed: stronger tiers, and why."""

    name: str | None
    failed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        missing = "; ".join(f"{name}: {reason}" for name, reason in self.failed)
        return f"{self.name or 'none'}{f' ({missing})' if missing else ''}"


@contextmanager
def _bait() -> Iterator[tuple[str, int, int, bytes]]:
    """Targets of the attempts: a file, a listening port, a process id, and the cookie of their network namespace."""
    with tempfile.TemporaryDirectory(prefix="fluid-eval-bait-") as folder, socket.create_server(("127.0.0.1", 0)) as s:
        secret = Path(folder, "secret")
        secret.write_text("secret")
        network = b""
        with suppress(OSError):  # needs Linux 5.14; tiers that share this namespace need more
            network = s.getsockopt(socket.SOL_SOCKET, 71, 8)  # SO_NETNS_COOKIE
        yield str(secret), s.getsockname()[1], os.getpid(), network


def failure_of(tier: type[Tier]) -> str:
    """Why a tier does not hold on this machine, "" if it does."""
    from .pool import WardenProcess

    if sys.platform != "linux":
        return "needs Linux"
    try:
        with _bait() as bait, WardenProcess(tier.name) as warden:
            attempted = warden.judge(
                Trial(ATTEMPTS, f"done = attempts{bait}\nassert not done, f'did {{done}}'", timeout=15)
            )
            filled = warden.judge(Trial(ATTEMPTS, "fill()", timeout=15))
    except OSError as error:
        return " ".join(str(error).split())
    if filled.passed:
        return "did fill the disk"
    return "" if attempted.passed else attempted.detail or attempted.reason


@functools.cache
def report() -> dict[str, str]:
    """All tiers, each with the reason why it does not hold on this machine, "" if it does."""
    return {tier.name: failure_of(tier) for tier in LADDER}


@functools.cache
def strongest_tier() -> IsolationHere:
    """The strongest tier that holds on this machine. Takes about a second, once."""
    failed: list[tuple[str, str]] = []
    for tier in LADDER:
        reason = failure_of(tier)
        if not reason:
            return IsolationHere(tier.name, tuple(failed))
        failed.append((tier.name, reason))
    return IsolationHere(None, tuple(failed))


def chosen(*, allow_unsafe: bool) -> str:
    """The tier to judge in. Raises ConfigError, naming the options, if none holds and running unsafe is not allowed."""
    here = strongest_tier()
    if here.name is not None:
        return here.name
    if not allow_unsafe or sys.platform == "win32":
        failed = str(here).removeprefix("none (").removesuffix(")")
        raise ConfigError(f"code cannot be isolated here ({failed}); {WAYS_OUT}")
    return Unsafe.name


def tier_named(name: str, *values: Any) -> Tier:
    """A tier by name, constructed with `values`."""
    every: tuple[type[Tier], ...] = (*LADDER, Unsafe)
    return next(tier for tier in every if tier.name == name)(*values)
