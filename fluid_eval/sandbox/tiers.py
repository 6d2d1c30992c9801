"""Isolation tiers: ways to start a jailed interpreter, the strongest first (LADDER).

    Sandlock     Landlock and seccomp, by the library sandlock        Linux 6.7
    Bubblewrap   namespaces, by bwrap                                 bwrap, user namespaces
    Unshare      namespaces, by system calls of our own               user namespaces
    Unsafe       resource limits only                                 --allow-unsafe-code

All but Unsafe give a fresh interpreter no environment, an empty private folder, no network, and the interpreter's own
files only. Its first statements set resource limits on itself, which it cannot lift (BOOT).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from . import calls, spaces
from .files import NO_SITE, Files

DISK = 8 << 20
"""Bytes of the private folder."""
FILE = 1 << 20
DEEPEST = 64
"""Levels of nested folders."""
LIMITS = {
    "AS": 1 << 30,
    "CPU": 60,
    "FSIZE": FILE,
    "NOFILE": 64,
    "CORE": 0,
    "MEMLOCK": 0,
    "MSGQUEUE": 0,
    "SIGPENDING": 64,
}
"""Bytes of memory, seconds of processor time, bytes of a file, open files; bytes of a core dump, of locked memory and
of message queues, pending signals. The last ones would use up quotas of the user, who runs other processes.
"""
_NAMESPACED = {"NPROC": 64}
"""Processes and threads, in tiers where the kernel counts them by user namespace (for root it does not)."""
BOOT = """import marshal, resource, sys
for name, most in LIMITS.items():
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    try:
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard),) * 2)
    except ValueError:
        if sys.platform == "linux":
            raise
exec(CONFINING, {})
exec(marshal.load(sys.stdin.buffer), {"__name__": "jailed"})"""
"""First code of an interpreter: set the limits, confine itself, then run code from standard input."""
_WORK = "/work"


@dataclass(frozen=True)
class Jailed:
    """A running interpreter. stdin, stdout: our ends of its pipes.  end: kills and reaps it with all its processes.

    folder: its private folder, if that has no file system limit and must be watched; else None.
    """

    stdin: int
    stdout: int
    end: Callable[[], None]
    folder: str | None = None

    def overfull(self) -> bool:
        """Whether the private folder exceeds DISK bytes or DEEPEST levels, or cannot be read."""
        return self.folder is not None and _overfull(self.folder)


def _overfull(folder: str) -> bool:
    """Stops at the limit, so that many files do not make the scan long."""
    size, waiting = 0, [(folder, 0)]
    try:
        while waiting:
            place, depth = waiting.pop()
            with suppress(FileNotFoundError), os.scandir(place) as entries:  # removed during the scan
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        size += FILE // 64
                        waiting.append((entry.path, depth + 1))
                    else:
                        with suppress(FileNotFoundError):
                            size += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if size > DISK or depth >= DEEPEST:
                        return True
    except OSError:
        return True
    return False


def remove(folder: str) -> None:
    """Remove the private folder of a program that has ended. Never raises.

    Works at any depth, beyond the longest path: contents of inner folders are moved up until no folder is left.
    """
    with suppress(OSError):
        os.chmod(folder, 0o700)
        while entries := _entries(folder):
            above = os.path.join(folder, secrets.token_hex(8))  # a name that is not taken
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                for number, inner in enumerate(_entries(entry.path)):
                    os.rename(inner.path, f"{above}-{entry.inode()}-{number}")
                os.rmdir(entry.path)
        os.rmdir(folder)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Entries of a folder, its inner folders made accessible."""
    with os.scandir(folder) as scanned:
        entries = list(scanned)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
    return entries


class Tier:
    """A way to start a jailed interpreter. name: as recorded in outcomes.  needs: requirement, for error messages."""

    name: str
    needs: str
    limits: ClassVar[dict[str, int]] = LIMITS

    def __init__(self, files: Files) -> None:
        """Raises OSError or ImportError if a requirement is missing."""
        self.files = files
        self.command = self.booting("")

    def booting(self, confining: str) -> list[str]:
        """The interpreter's command line. confining: source that it runs after setting its limits."""
        boot = BOOT.replace("LIMITS", repr(self.limits)).replace("CONFINING", repr(confining))
        return [self.files.executable, *NO_SITE, "-c", boot]

    def settle(self) -> None:
        """Set up process-wide state. The process must serve this tier only."""

    def start(self, *, processes: bool) -> Jailed:
        """Start an interpreter. processes: allow fork (the judge needs it).  Raises OSError on failure."""
        raise NotImplementedError


class Sandlock(Tier):
    """Landlock and seccomp, by the library of that name.

    The library's filter does not cover most network calls, and leaves root its capabilities. So before it reads a
    program, the interpreter drops capabilities, adds our filter, and asks for SIGKILL when the warden ends (there is no
    process namespace to end it). The library's copy-on-write folder has a quota but is not used: it allows calls that
    change attributes of any file. The private folder is a file system of its own if mounts are possible, else watched.
    """

    name = "sandlock"
    needs = "pip install sandlock (Linux 6.7, libseccomp)"

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        import sandlock

        if sandlock.landlock_abi_version() < sandlock.min_landlock_abi():
            raise OSError(f"this kernel's Landlock is of version {sandlock.landlock_abi_version()}, 6 is needed")
        self._mounts = False
        self._commands = {}
        for processes in (False, True):
            if (filtered := calls.system_call_filter(processes=processes, programs=False)) is None:
                raise OSError("pyseccomp, or the libseccomp it needs, is missing")
            self._commands[processes] = self.booting(spaces.confining(filtered, os.getpid()))

    def settle(self) -> None:
        with suppress(OSError):
            spaces.own_mounts()
            self._mounts = True

    def start(self, *, processes: bool) -> Jailed:
        import sandlock

        folder = tempfile.mkdtemp(prefix="fluid-eval-")
        shared = [spaces.SHARED] if self._mounts else []
        try:
            box = sandlock.Sandbox(
                fs_readable=sorted({source for source, _ in self.files.binds}),
                fs_writable=[folder, os.devnull, *shared],
                fs_denied=list(self.files.hidden),
                max_processes=8 if processes else 1,
                clean_env=True,
                cwd=folder,
            )
            pipe = sandlock.StdioMode.PIPED
            # started within the mount, the interpreter keeps it when we leave
            with spaces.covered(folder, DISK) if self._mounts else nullcontext():
                process = box.popen(self._commands[processes], stdin=pipe, stdout=pipe, stderr=sandlock.StdioMode.NULL)
                pidfd = os.pidfd_open(process.pid)
        except BaseException as error:
            remove(folder)
            raise OSError(f"sandlock: {error}") from error
        end = partial(_end_sandlock, process, pidfd, folder)
        return Jailed(process.stdin.fileno(), process.stdout.fileno(), end, None if self._mounts else folder)


def _end_sandlock(process: Any, pidfd: int, folder: str) -> None:
    """Kill the process and its group, and reap it."""
    by_pidfd = partial(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
    for step in (by_pidfd, process.kill, partial(process.wait, timeout=5)):
        with suppress(OSError, RuntimeError):
            step()
    os.close(pidfd)
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            stream.close()
    remove(folder)


class Bubblewrap(Tier):
    """Namespaces by bwrap, with our system-call filter if libseccomp is installed."""

    name = "bubblewrap"
    needs = "apt install bubblewrap"
    limits: ClassVar = LIMITS | _NAMESPACED

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise OSError("bwrap is not installed")
        words = [bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--die-with-parent"]
        words += ["--clearenv", "--cap-drop", "ALL", "--dev-bind", os.devnull, os.devnull]
        for source, place in files.binds:
            words += ["--ro-bind", source, place]
        for folder in files.hidden:
            words += ["--tmpfs", folder, "--remount-ro", folder]
        words += ["--perms", "0700", "--size", str(DISK), "--tmpfs", _WORK, "--chdir", _WORK]
        words += ["--perms", "0700", "--size", str(FILE), "--tmpfs", spaces.SHARED, "--remount-ro", "/"]
        self._words = words
        self._filters = {processes: calls.system_call_filter(processes=processes) for processes in (False, True)}

    def start(self, *, processes: bool) -> Jailed:
        # 1) bwrap reads the filter from a pipe
        words = list(self._words)
        passed: tuple[int, ...] = ()
        if (filtered := self._filters[processes]) is not None:
            number, sent = os.pipe()
            os.write(sent, filtered)
            os.close(sent)
            words += ["--seccomp", str(number)]
            passed = (number,)
        # 2) start
        try:
            process = subprocess.Popen(
                [*words, "--", *self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, pass_fds=passed, env={}, bufsize=0, start_new_session=True,
            )  # fmt: skip
        finally:
            for number in passed:
                os.close(number)
        assert process.stdin
        assert process.stdout
        return Jailed(process.stdin.fileno(), process.stdout.fileno(), partial(_end_popen, process))


def _end_popen(process: subprocess.Popen[bytes]) -> None:
    _end_group(process.pid)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _end_group(leader: int) -> None:
    """Kill a process group, and reap its members that are, or become, our children."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-leader, 0)


class Unshare(Tier):
    """Namespaces by system calls of our own, with our system-call filter if libseccomp is installed."""

    name = "unshare"
    needs = "user namespaces"
    limits: ClassVar = LIMITS | _NAMESPACED

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._root = tempfile.TemporaryDirectory(prefix="fluid-eval-")
        self._filters = {processes: calls.system_call_filter(processes=processes) for processes in (False, True)}

    def start(self, *, processes: bool) -> Jailed:
        (read, stdin), (stdout, write) = os.pipe(), os.pipe()
        files, root = self.files, Path(self._root.name)
        prepare = partial(spaces.enter, files.binds, files.hidden, root, _WORK, DISK)
        try:
            leader = spaces.spawn(self.command, read, write, prepare, self._filters[processes])
        finally:
            os.close(read)
            os.close(write)
        return Jailed(stdin, stdout, partial(_end_spawned, leader, stdin, stdout))


def _end_spawned(leader: int, *ends: int) -> None:
    _end_group(leader)
    for number in ends:
        os.close(number)


class Unsafe(Tier):
    """No isolation: a separate process with resource limits, which can read files and use the network."""

    name = "none (separate process, limits)"
    needs = "--allow-unsafe-code"

    def start(self, *, processes: bool) -> Jailed:
        folder = tempfile.mkdtemp(prefix="fluid-eval-")
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd=folder,
            bufsize=0, start_new_session=True,
        )  # fmt: skip
        assert process.stdin
        assert process.stdout

        def end() -> None:
            _end_popen(process)
            remove(folder)

        return Jailed(process.stdin.fileno(), process.stdout.fileno(), end, folder)


LADDER: tuple[type[Tier], ...] = (Sandlock, Bubblewrap, Unshare)
