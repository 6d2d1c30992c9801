"""Linux namespaces for tiers without a library for them, and restrictions that a process puts on itself: capabilities,
death signal, seccomp filter.
"""

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
"""Folder of named semaphores, which the locks of `multiprocessing` are."""


def apply_filter(program: bytes) -> None:
    """Put this process, and programs it executes, under a seccomp filter. Raises OSError if the kernel refuses."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    code = ctypes.create_string_buffer(program, len(program))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    _call("prctl", 22, 2, ctypes.byref(header), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def confining(filtered: bytes, parent: int) -> str:
    """Python source by which an interpreter drops its capabilities, ends with its parent and sets the filter itself.

    For tiers whose launcher does not.
    """
    parts = [inspect.getsource(part) for part in (_call, drop_privileges, die_with_parent, apply_filter)]
    head = "from __future__ import annotations\nimport ctypes, os\n"  # each import costs every program milliseconds
    values = (
        f"_LIBC, _NO_NEW_PRIVILEGES = ctypes.CDLL(None, use_errno=True), {_NO_NEW_PRIVILEGES}\n"
        f"_DEATH_SIGNAL, _KILL = {_DEATH_SIGNAL}, {int(_KILL)}\n"
    )
    run = f"drop_privileges()\ndie_with_parent({parent})\napply_filter({filtered!r})\n"
    return "\n".join([head, values, *parts, run])


def enter(binds: Sequence[tuple[str, str]], hidden: Sequence[str], root: Path, work: str, disk: int) -> None:
    """Move this process into new namespaces, with no network and no other processes in sight.

    Its files are `binds` (source, place), read-only, without `hidden`, and an empty folder `work` of `disk` bytes,
    which is /dev/shm too. root: an empty folder, used as mount point.
    Only children of this process are in the new process namespace.  Raises OSError if the kernel refuses.
    """
    # 1) namespaces; the user becomes nobody
    user, group = os.geteuid(), os.getegid()
    _call("unshare", sum(_NEW.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        Path("/proc/self", name).write_text(text)
    # 2) a new root with the interpreter's files
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", str(root), "tmpfs", _NO_SUID | _NO_DEV, "size=1m,mode=755")
    for source, place in (*binds, ("/dev/null", "/dev/null")):
        _bind(source, Path(f"{root}{place}"))
    for folder in hidden:
        _mount("tmpfs", f"{root}{folder}", "tmpfs", _READ_ONLY | _NO_SUID | _NO_DEV, "size=4k")
    # 3) the private folder
    private = Path(f"{root}{work}")
    private.mkdir(parents=True, exist_ok=True)
    old = root / "old"
    old.mkdir()
    _mount("tmpfs", str(private), "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, f"size={disk},nr_inodes=1024,mode=777")
    shared = Path(f"{root}{SHARED}")
    shared.mkdir()
    _mount(str(private), str(shared), None, _BIND)
    # 4) switch to the new root, drop the old one, make it read-only
    _call("syscall", _pivot_root(), str(root).encode(), str(old).encode())
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV)
    os.chdir(work)


def own_mounts() -> None:
    """Give this process its own mount namespace. For processes with a single thread.

    Raises OSError if the kernel refuses, as it does an ordinary user where user namespaces are off.
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
    """Mount an empty file system of `disk` bytes over a folder and /dev/shm, visible to processes started within only.

    For processes with a mount namespace of their own. Raises OSError if the kernel refuses.
    """
    _call("unshare", _NEW["NS"])
    _mount("tmpfs", folder, "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, f"size={disk},nr_inodes=1024,mode=700")
    _mount(folder, SHARED, None, _BIND)
    try:
        yield
    finally:
        _call("unshare", _NEW["NS"])  # unmount in a copy: processes started within keep theirs
        for place in (SHARED, folder):
            _call("umount2", place.encode(), _DETACH)


def drop_privileges() -> None:
    """Drop all capabilities. The mounts and namespaces of this process stay."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    for capability in range(64):
        try:
            _call("prctl", 24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
        except OSError:  # beyond the last capability, or none to drop
            break
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(Header(0x20080522, 0)), ctypes.byref(none))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. parent: its id, 0 if in another process namespace."""
    _call("prctl", _DEATH_SIGNAL, _KILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(127)


def spawn(words: Sequence[str], stdin: int, stdout: int, prepare: Callable[[], None], filtered: bytes | None) -> int:
    """Run a command, without environment, as the first process of the namespaces that `prepare` makes, under a filter.

        caller
        └─ leader      leads a process group; killed with the caller
           └─ keeper   first process of the outer process namespace, which ends with it
              └─ first process of the inner namespace: the command

    Returns the leader's id. The leader ends when the command does. If the leader or the caller is killed, the kernel
    ends every process that the command has made: a process namespace ends with its first process.
    For callers with a single thread.
    """
    caller = os.getpid()
    leader = os.fork()
    if leader:
        return leader
    try:
        # 1) leader: a new session, then namespaces
        os.setsid()
        die_with_parent(caller)
        null = os.open(os.devnull, os.O_RDWR)
        ours = os.pidfd_open(os.getpid())
        prepare()
        if (keeper := os.fork()) != 0:
            _wait_for(keeper)
        # 2) keeper
        die_with_parent(0)
        if select.select([ours], [], [], 0)[0]:
            os._exit(127)
        _call("unshare", _NEW["PID"])
        if (first := os.fork()) != 0:
            _wait_for(first)
        # 3) the command: only its own processes are in sight
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
    # a remount may not clear these flags
    locked = os.statvfs(place).f_flag & (_NO_SUID | _NO_DEV | _NO_EXEC | 1024 | 2048)
    device = 0 if source == os.devnull else _READ_ONLY | _NO_DEV
    _mount("none", str(place), None, _BIND | _REMOUNT | _NO_SUID | locked | device)


def _mount(source: str, place: str, kind: str | None, flags: int, data: str = "") -> None:
    _call("mount", source.encode(), place.encode(), kind.encode() if kind else None, flags, data.encode() or None)


def _pivot_root() -> int:
    return {"x86_64": 155}.get(os.uname().machine, 41)


def _call(name: str, *values: object) -> None:
    """A C library call. Raises OSError, with its name, if it fails."""
    if getattr(_LIBC, name)(*values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
