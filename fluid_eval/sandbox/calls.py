"""The system-call filter: what a jailed interpreter may ask of the kernel. All else fails as if the kernel had it not.

A list of what is allowed, since a list of what is refused is never complete: each kernel brings calls that take a quota
of the machine's, change a file's marks or reach another process. docs/security.md says of each family why.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
from typing import Any, NamedTuple

FREE = {
    "reading and writing": "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close "
    "close_range dup dup2 dup3 pipe pipe2 sendfile copy_file_range truncate ftruncate flock",
    "finding files": "open openat creat stat lstat fstat newfstatat statx access faccessat "
    "faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir statfs fstatfs umask",
    "making files": "mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat mknod "
    "mknodat",
    "waiting": "select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait "
    "epoll_pwait2 eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime nanosleep clock_nanosleep pause",
    "memory": "brk munmap mprotect mremap msync",
    "threads": "futex futex_waitv sched_yield set_robust_list set_tid_address rseq arch_prctl getcpu "
    "sched_get_priority_max sched_get_priority_min exit exit_group restart_syscall",
    "signals": "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack "
    "signalfd signalfd4 kill tkill tgkill alarm getitimer setitimer",
    "time and chance": "clock_gettime clock_getres gettimeofday time times getrandom",
    "who and where one is": "getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp "
    "getrlimit setrlimit getrusage sysinfo uname capget wait4 waitid",
    "a pair of sockets": "recvfrom shutdown getsockname getpeername getsockopt",
}
"""Calls with any arguments, by what they are for. Those on sockets find only pairs: none other can be made."""
PRETENDED = ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range")
"""Answered as done, and not done: they would hold up the machine's disk, and nothing here outlives its program."""

_INT = 0xFFFFFFFF
"""The bits that the kernel looks at of an int: a filter sees 64, of which a program chooses the others."""
_NEW = 0x7E020000
"""CLONE_NEW..."""
_THREAD, _SIBLING, _NAMESPACES = 0x10000, 0x8000, _NEW
_HUGE = 0x40000
"""MAP_HUGETLB: the machine's, not the program's."""
_STREAM_FLAGS = 0o4000 | 0o2000000  # SOCK_NONBLOCK, SOCK_CLOEXEC
_FILE_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Not
leases, not news of a folder, not owners of signals, not the size of pipes.
"""
_DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not a file's flags, marks and versions."""
_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
"""madvise: of a process's own use, such as MADV_DONTNEED, MADV_FREE and MADV_HUGEPAGE."""
_OWN_NAME, _THEIR_NAME, _NAME_OF_MEMORY = 15, 16, 0x53564D41
_DEATH_SIGNAL = 1


class Bits(NamedTuple):
    """An argument of which these bits are this. number: which argument, from 0."""

    number: int
    bits: int
    value: int


def _ints(number: int, *values: int) -> list[list[Bits]]:
    return [[Bits(number, _INT, value)] for value in values]


def conditions(*, processes: bool) -> dict[str, list[list[Bits]]]:
    """Calls that are allowed with some arguments: name -> alternatives, each of conditions that hold together."""
    thread = Bits(0, _THREAD | _NAMESPACES, _THREAD)
    fork = Bits(0, _SIBLING | _NAMESPACES, 0)
    return {
        "clone": [[thread], [fork]] if processes else [[thread]],
        "fcntl": _ints(1, *_FILE_COMMANDS),
        "ioctl": _ints(1, *_DEVICE_COMMANDS),
        "madvise": _ints(2, *_ADVICE),
        "mmap": [[Bits(3, _HUGE, 0)]],
        "prctl": [
            *_ints(0, _OWN_NAME, _THEIR_NAME, _NAME_OF_MEMORY),
            [Bits(0, _INT, _DEATH_SIGNAL), Bits(1, -1, signal.SIGKILL)],  # never to be outlived: see confining
        ],
        "prlimit64": _ints(0, 0),  # the caller itself, by 0
        "sched_getaffinity": _ints(0, 0),
        "sendto": [[Bits(4, -1, 0)]],  # to nobody but the other end
        "socketpair": [[Bits(0, _INT, socket.AF_UNIX), Bits(1, _INT & ~_STREAM_FLAGS, socket.SOCK_STREAM)]],
    }


def system_call_filter(*, processes: bool, programs: bool = True) -> bytes | None:
    """A seccomp filter as BPF. processes: whether it may make processes.  programs: whether it may become another one,
    as whatever starts an interpreter does.

    None where pyseccomp, or the libseccomp it needs, is missing.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError):
        return None
    filtered = seccomp.SyscallFilter(defaction=seccomp.ERRNO(errno.ENOSYS))
    free = " ".join(FREE.values()).split()
    free += ["fork", "vfork"] if processes else []
    free += ["execve"] if programs else []
    for name in free:
        _add(filtered, seccomp.ALLOW, name)
    for name in PRETENDED:
        _add(filtered, seccomp.ERRNO(0), name)
    for name, alternatives in conditions(processes=processes).items():
        for together in alternatives:
            compared = [seccomp.Arg(n, seccomp.MASKED_EQ, bits & (1 << 64) - 1, value) for n, bits, value in together]
            _add(filtered, seccomp.ALLOW, name, *compared)
    with tempfile.TemporaryFile() as file:
        filtered.export_bpf(file)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return file.read()


def _add(filtered: Any, action: int, name: str, *compared: Any) -> None:
    try:
        filtered.add_rule(action, name, *compared)
    except OSError:
        return  # not a call of this machine's
