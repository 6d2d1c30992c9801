"""How many files a sweep may have open at a time."""

from __future__ import annotations

from fluid_model.common.errors import ConfigError

OTHER_FILES = 500
"""Files that a process has open beside those of the points: libraries, Ray."""


def allow_open_files(points: int) -> None:
    """Raise the limit of open files to two a point, one to write and one to read. Raises ConfigError if not allowed."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * points + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise ConfigError(
                f"a sweep of {points} points needs {need} open files, and {hard} are allowed: raise ulimit -n, or take "
                "fewer points at a time"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
