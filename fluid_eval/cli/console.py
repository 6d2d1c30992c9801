"""Output and errors of every command: unencodable letters, closed or full outputs, errors as one line.

No torch is imported: its out-of-memory errors are recognised by their messages.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys

from fluid_model.common.errors import ConfigError, RunError

from . import EXIT_CONFIG, EXIT_FAILED

_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|cannot allocate memory|failed to map segment|unable to mmap|bad_alloc"
    r"|can't start new thread|failed to create thread",
    re.IGNORECASE,
)
"""Messages of libraries for missing memory, or a missing thread stack."""


def tolerate_any_output() -> None:
    """Replace letters that the output cannot encode by question marks, so that a dash ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def in_one_line(error: Exception) -> tuple[str | None, int]:
    """(message, exit code) for an exception that ended a command.

    The message is None for faults of this program, which need a traceback. It is empty if the output was closed.
    """
    if isinstance(error, ConfigError):
        return _joined(error), EXIT_CONFIG
    if isinstance(error, RunError):
        return _joined(error), EXIT_FAILED
    if isinstance(error, BrokenPipeError):
        _silence()
        return "", EXIT_FAILED
    if is_no_memory(error):
        return f"{_allowed()}, and that is too little: {_joined(error) or 'no more can be had'}", EXIT_FAILED
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~, and there is no home directory here; write it out, or set HOME", EXIT_CONFIG
    if isinstance(error, OSError):
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF):
            _silence()
            return f"standard output: {error.strerror}", EXIT_FAILED
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or _joined(error)}; what is finished is stored", EXIT_FAILED
    return None, EXIT_FAILED


def is_no_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that memory ran out."""
    while error is not None:
        kind = isinstance(error, RuntimeError | ImportError | OSError)
        if isinstance(error, MemoryError) or (kind and _NO_MEMORY.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _joined(error: Exception) -> str:
    return " ".join(str(error).split())


def _allowed() -> str:
    """The memory available to this process, in words."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"out of memory: ulimit -v allows {limit / 2**30:.1f} GiB"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"out of memory: {free / 2**30:.1f} GiB are free here"


def _silence() -> None:
    """Redirect standard output to nowhere, so that the interpreter's last flush does not fail again."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no descriptor behind it
        pass
