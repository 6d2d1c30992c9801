"""Linux namespaces and system-call filters, for the tiers that have no library for them. Called in forked children."""

from __future__ import annotations

import ctypes
import errno
import inspect
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
_NEW = {"NS": 0x20000, "CGROUP": 0x2000000, "UTS": 0x4000000, "IPC": 0x8000000, "USER": 0x10000000,
        "PID": 0x20000000, "NET": 0x40000000}  # fmt: skip
"""unshare(2): CLONE_NEW..."""
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH, _DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _THREAD = 2, 1, 38, 0x10000

_DESCRIPTORS = 4096
PROCESSES = ("fork", "vfork")
"""Calls that make processes; `clone` does too, unless it makes a thread."""
DENIED = (
    "socket", "socketpair", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "unshare",
    "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig",
    "mount_setattr", "name_to_handle_at", "open_by_handle_at", "bpf", "perf_event_open", "userfaultfd",
    "io_uring_setup", "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl", "shmget", "msgget",
    "semget", "mq_open", "memfd_create", "memfd_secret", "shmat", "shmctl", "shmdt", "msgsnd", "msgrcv", "msgctl",
    "semop", "semtimedop", "semctl", "mq_unlink", "setpriority", "sched_setaffinity", "sched_setscheduler",
    "sched_setparam", "sched_setattr", "ioprio_set", "inotify_init", "inotify_init1", "personality", "quotactl", "acct",
    "swapon", "swapoff", "reboot", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load",
    "syslog", "vhangup", "fanotify_init", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "sethostname",
    "setdomainname", "vmsplice", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat",
    "utime", "utimes", "utimensat", "futimesat", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr",
    "fremovexattr", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "setfsuid",
    "setfsgid",
)  # fmt: skip
"""Calls that no program of a benchmark needs: to the network, other processes, the kernel's far corners, who one is,
and those that change a file's marks, which Landlock lets pass.
"""


def system_call_filter(*, processes: bool) -> bytes | None:
    """A seccomp filter as BPF: the calls above fail. processes: whether it may make processes.

    None where pyseccomp, or the libseccomp it needs, is missing.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError):
        return None
    allowed = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
    refuse, absent = seccomp.ERRNO(errno.EPERM), seccomp.ERRNO(errno.ENOSYS)
    allowed.add_rule(absent, "clone3")  # its flags lie in memory, out of a filter's sight; libraries fall back on clone
    for name in DENIED:
        try:
            allowed.add_rule(refuse, name)
        except OSError:
            continue  # not a call of this machine's
    allowed.add_rule(refuse, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))  # of others; 0 is the caller
    if not processes:
        for name in PROCESSES:
            try:
                allowed.add_rule(refuse, name)
            except OSError:
                continue
        allowed.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, _THREAD, 0))
    with tempfile.TemporaryFile() as file:
        allowed.export_bpf(file)
        file.seek(0)
        return file.read()


def apply_filter(program: bytes) -> None:
    """Put this process, and what it becomes, under a filter. Raises OSError where the kernel refuses."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    code = ctypes.create_string_buffer(program, len(program))
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    found = Program(len(program) // 8, ctypes.cast(code, ctypes.c_void_p))
    _call("prctl", 22, 2, ctypes.byref(found), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def confining(filtered: bytes) -> str:
    """Source of what an interpreter runs to give up its capabilities and put itself under a filter, where nothing that
    starts it does so.
    """
    parts = [inspect.getsource(part) for part in (_call, drop_privileges, apply_filter)]
    head = "from __future__ import annotations\nimport ctypes, os\n"  # each import costs every program milliseconds
    values = f"_LIBC, _NO_NEW_PRIVILEGES = ctypes.CDLL(None, use_errno=True), {_NO_NEW_PRIVILEGES}\n"
    return "\n".join([head, values, *parts, f"drop_privileges()\napply_filter({filtered!r})\n"])


def enter(binds: Sequence[tuple[str, str]], hidden: Sequence[str], root: Path, work: str, disk: int) -> None:
    """Move this process into namespaces of its own: no network, no processes of others, and for files only `binds`
    (source, place), read-only, without `hidden`, and an empty folder `work` of `disk` bytes.

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
    _call("syscall", _pivot_root(), str(root).encode(), str(old).encode())
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | _NO_DEV)
    os.chdir(work)


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


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that made it ends."""
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def spawn(words: Sequence[str], stdin: int, stdout: int, prepare: Callable[[], None], filtered: bytes | None) -> int:
    """Run words, without environment, as the first process of the namespaces that `prepare` makes and under a filter.

    Returns the id of a process, leader of a group, that ends when that one does and with which that one ends.  For
    callers with a single thread.
    """
    waiting = os.fork()
    if waiting:
        return waiting
    try:
        os.setsid()
        die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        prepare()
        inner = os.fork()
        if inner:
            os.closerange(0, _DESCRIPTORS)
            os._exit(0 if os.waitpid(inner, 0)[1] == 0 else 1)
        die_with_parent()
        for source, target in ((stdin, 0), (stdout, 1), (null, 2)):
            os.dup2(source, target)
        os.closerange(3, _DESCRIPTORS)
        drop_privileges()
        if filtered is not None:
            apply_filter(filtered)
        os.execve(words[0], list(words), {})
    finally:
        os._exit(127)


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
