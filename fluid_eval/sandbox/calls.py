"""The system-call filter (seccomp) of a jailed interpreter: an allow list. Other calls fail with ENOSYS.

A deny list would never be complete: new kernels bring calls that use up the user's quotas, change file attributes or
reach other processes. docs/security.md gives the reason for each family.
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
"""Calls allowed with any arguments, by purpose. Socket calls meet socket pairs only: no other socket can be made."""
PRETENDED = ("fsync", "fdatasync", "sync", "syncfs", "sync_file_range")
"""Calls that return success without effect: they would block the machine's disk, and no file outlives its program."""

_INT = 0xFFFFFFFF
"""The bits of an int argument that the kernel reads. A filter sees 64; the program chooses the others."""
_NEW = 0x7E020000
"""CLONE_NEW..."""
_THREAD, _SIBLING, _NAMESPACES = 0x10000, 0x8000, _NEW
_HUGE = 0x40000
"""MAP_HUGETLB: huge pages are the machine's, not the program's."""
_STREAM_FLAGS = 0o4000 | 0o2000000  # SOCK_NONBLOCK, SOCK_CLOEXEC
_FILE_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC, F_GETPIPE_SZ.
Without leases, directory notification, signal owners and pipe sizes.
"""
_DEVICE_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Without a file's flags, attributes and versions."""
_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
"""madvise: advice about the process's own memory, such as MADV_DONTNEED, MADV_FREE and MADV_HUGEPAGE."""
_OWN_NAME, _THEIR_NAME, _NAME_OF_MEMORY = 15, 16, 0x53564D41
_DEATH_SIGNAL = 1


class ArgumentBits(NamedTuple):
    """A condition on an argument: its bits under the mask `bits` equal `value`. number: of the argument, from 0."""

    number: int
    bits: int
    value: int


def _ints(number: int, *values: int) -> list[list[ArgumentBits]]:
    return [[ArgumentBits(number, _INT, value)] for value in values]


def conditions(*, processes: bool) -> dict[str, list[list[ArgumentBits]]]:
    """Calls allowed with some arguments: name -> alternatives, each a list of conditions that must all hold."""
    thread = ArgumentBits(0, _THREAD | _NAMESPACES, _THREAD)
    fork = ArgumentBits(0, _SIBLING | _NAMESPACES, 0)
    return {
        "clone": [[thread], [fork]] if processes else [[thread]],
        "fcntl": _ints(1, *_FILE_COMMANDS),
        "ioctl": _ints(1, *_DEVICE_COMMANDS),
        "madvise": _ints(2, *_ADVICE),
        "mmap": [[ArgumentBits(3, _HUGE, 0)]],
        "prctl": [
            *_ints(0, _OWN_NAME, _THEIR_NAME, _NAME_OF_MEMORY),
            [
                ArgumentBits(0, _INT, _DEATH_SIGNAL),
                ArgumentBits(1, -1, signal.SIGKILL),
            ],  # SIGKILL when the parent ends: see confining
        ],
        "prlimit64": _ints(0, 0),  # the caller itself, by 0
        "sched_getaffinity": _ints(0, 0),
        "sendto": [[ArgumentBits(4, -1, 0)]],  # no address: to the other end of the pair
        "socketpair": [
            [ArgumentBits(0, _INT, socket.AF_UNIX), ArgumentBits(1, _INT & ~_STREAM_FLAGS, socket.SOCK_STREAM)]
        ],
    }


def system_call_filter(*, processes: bool, programs: bool = True) -> bytes | None:
    """The filter as a BPF program; None if pyseccomp, or the libseccomp it needs, is missing.

    processes: allow fork.  programs: allow execve, which the launcher of an interpreter needs.
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
        return  # this architecture has no such call
