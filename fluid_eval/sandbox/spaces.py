"""Linux namespaces, for the tiers that have no library for them, and what a process takes upon itself for good."""

from __future__ import annotations

import ctypes
import inspect
import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_NEW = {"NS": 0x20000, "CGROUP": 0x2000000, "UTS": 0x4000000, "IPC": 0x8000000, "USER": 0x10000000,
        "PID": 0x20000000, "NET": 0x40000000}  # fmt: skip
"""unshare(2): CLONE_NEW..."""
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_KILL = signal.SIGKILL
_DETACH, _DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 2, 1, 38

_DESCRIPTORS = 4096
SHARED = "/dev/shm"
"""Where the C library keeps named semaphores, which locks of `multiprocessing` are."""


def apply_filter(program: bytes) -> None:
    """Put this process, and what it becomes, under a filter. Raises OSError where the kernel refuses."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    code = ctypes.create_string_buffer(program, len(program))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    found = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    _call("prctl", 22, 2, ctypes.byref(found), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def confining(filtered: bytes, parent: int) -> str:
    """Source of what an interpreter runs to give up its capabilities, end with its parent and put itself under a
    filter, where nothing that starts it does so.
    """
    parts = [inspect.getsource(part) for part in (_call, drop_privileges, die_with_parent, apply_filter)]
    head = "from __future__ import annotations\nimport ctypes, os\n"  # each import costs every program milliseconds
    values = (
        f"_LIBC, _NO_NEW_PRIVILEGES = ctypes.CDLL(None, use_errno=True), {_NO_NEW_PRIVILEGES}\n"
        f"_DEATH_SIGNAL, _KILL = {_DEATH_SIGNAL}, {int(_KILL)}\n"
    )
    ran = f"drop_privileges()\ndie_with_parent({parent})\napply_filter({filtered!r})\n"
    return "\n".join([head, values, *parts, ran])


def enter(binds: Sequence[tuple[str, str]], hidden: Sequence[str], root: Path, work: str, disk: int) -> None:
    """Move this process into namespaces of its own: no network, no processes of others, and for files only `binds`
    (source, place), read-only, without `hidden`, and an empty folder `work` of `disk` bytes, named /dev/shm too.

    root: an empty folder, covered meanwhile.  Only a child of this process is in its own process namespace.  Raises
    OSError where the kernel refuses.
    """
    user, group = os.geteuid(), os.getegid()
    _call("unshare", sum(_NEW.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        Path("/proc/self", name).write_text(text)
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", str(root), "tmpfs", _NO_SUID | _NO_DEV, "size=1m,mode=755")
    for source, place in (*binds, ("/dev/null", "/dev/null")):
        _bind(source, Path(f"{root}{place}"))
    for folder in hidden:
        _mount("tmpfs", f"{root}{folder}", "tmpfs", _READ_ONLY | _NO_SUID | _NO_DEV, "size=4k")
    here = Path(f"{root}{work}")
    here.mkdir(parents=True, exist_ok=True)
    old = root / "old"
    old.mkdir()
    _mount("tmpfs", str(here), "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, f"size={disk},nr_inodes=1024,mode=777")
    shared = Path(f"{root}{SHARED}")
    shared.mkdir()
    _mount(str(here), str(shared), None, _BIND)
    _call("syscall", _pivot_root(), str(root).encode(), str(old).encode())
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV)
    os.chdir(work)


def own_mounts() -> None:
    """Give this process a view of the file system that it may change. Raises OSError where the kernel refuses, as it
    does an ordinary user where user namespaces are off. For processes with a single thread.
    """
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _NEW["NS"])
    else:
        _call("unshare", _NEW["USER"] | _NEW["NS"])
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


@contextmanager
def covered(folder: str, disk: int) -> Iterator[None]:
    """What is started within finds an empty folder, and /dev/shm, to be new and of `disk` bytes; nobody else does.

    For processes with mounts of their own. Raises OSError where the kernel refuses.
    """
    _call("unshare", _NEW["NS"])
    _mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, f"size={disk},nr_inodes=1024,mode=700")
    _mount(folder, SHARED, None, _BIND)
    try:
        yield
    finally:
        _call("unshare", _NEW["NS"])  # a copy, in which it is taken away again
        for place in (SHARED, folder):
            _call("umount2", place.encode(), _DETACH)


def drop_privileges() -> None:
    """Give up all capabilities in the namespace: what it set up stays as it is."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    for capability in range(64):
        try:
            _call("prctl", 24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
        except OSError:  # beyond the last one there is, or there are none to give up
            break
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(Header(0x20080522, 0)), ctypes.byref(none))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. parent: its id, 0 where it is out of this one's sight."""
    _call("prctl", _DEATH_SIGNAL, _KILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(127)


def spawn(words: Sequence[str], stdin: int, stdout: int, prepare: Callable[[], None], filtered: bytes | None) -> int:
    """Run words, without environment, as the first process of namespaces that `prepare` makes and under a filter.

    Returns the id of a process, leader of a group, that ends when that one does. When it is killed, or this one is, the
    kernel ends all that words have made, whatever they did to be spared: each process namespace ends with its first
    process, and theirs lies within one whose first process is ours alone.  For callers with a single thread.
    """
    caller = os.getpid()
    leader = os.fork()
    if leader:
        return leader
    try:
        # 1) outside: in sight of the caller, and with nothing of words' in sight of it
        os.setsid()
        die_with_parent(caller)
        null = os.open(os.devnull, os.O_RDWR)
        ours = os.pidfd_open(os.getpid())
        prepare()
        if (keeper := os.fork()) != 0:
            _wait_for(keeper)
        # 2) the keeper: first of a process namespace, which ends with it
        die_with_parent(0)
        if select.select([ours], [], [], 0)[0]:
            os._exit(127)
        _call("unshare", _NEW["PID"])
        if (first := os.fork()) != 0:
            _wait_for(first)
        # 3) words: first of a namespace of their own, in which they see nobody
        for source, target in ((stdin, 0), (stdout, 1), (null, 2)):
            os.dup2(source, target)
        os.closerange(3, _DESCRIPTORS)
        drop_privileges()
        if filtered is not None:
            apply_filter(filtered)
        os.execve(words[0], list(words), {})
    finally:
        os._exit(127)


def _wait_for(child: int) -> NoReturn:
    os.closerange(0, _DESCRIPTORS)
    os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)


def _bind(source: str, place: Path) -> None:
    if os.path.isdir(source):
        place.mkdir(parents=True, exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    _mount(source, str(place), None, _BIND)
    held = os.statvfs(place).f_flag & (_NO_SUID | _NO_DEV | _NO_EXEC | 1024 | 2048)  # what a bind may not take away
    device = 0 if source == os.devnull else _READ_ONLY | _NO_DEV
    _mount("none", str(place), None, _BIND | _REMOUNT | _NO_SUID | held | device)


def _mount(source: str, place: str, kind: str | None, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), place.encode(), kind.encode() if kind else None, flags, data.encode() or None)


def _pivot_root() -> int:
    return {"x86_64": 155}.get(os.uname().machine, 41)


def _call(name: str, *values: object) -> None:
    """A C library call. Raises OSError, with its name, if it fails."""
    if getattr(_LIBC, name)(*values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
