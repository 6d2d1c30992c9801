"""The user's cache folder, with checks of its ownership: compiled code loaded from it runs as the user."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """The folder `fluid-eval` in XDG_CACHE_HOME or ~/.cache, created if missing; private to this user.

    Raises OSError if it cannot be created, or if another user could have written into it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # no such user, as in containers under a bare user id
        raise OSError("no home directory; XDG_CACHE_HOME names another place for the cache")
    place = Path(home).absolute() / "fluid-eval"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        _check(place, place.lstat(), stat.S_ISDIR)
        for above in Path(os.path.realpath(place)).parents:
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # others could replace the folder
                raise OSError(f"{above} can be written by everybody; XDG_CACHE_HOME names another place")
        place.chmod(0o700)  # earlier versions let others read it
    return place


def cached_file(name: str) -> Path | None:
    """A file of the cache folder, None if it is missing. Raises OSError if another user may have written it."""
    file = folder() / name
    try:
        status = file.lstat()
    except FileNotFoundError:
        return None
    if os.name == "posix":
        _check(file, status, stat.S_ISREG)
    return file


def _check(place: Path, status: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raise OSError unless the place is of its kind, this user's, and not writable by others."""
    if not is_kind(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise OSError(f"{place} is not this user's alone; remove it, or name another place by XDG_CACHE_HOME")
