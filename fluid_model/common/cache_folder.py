"""The user's cache folder, and whether what lies there may be trusted: compiled code from it runs as the user."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def folder() -> Path:
    """`fluid-eval` in XDG_CACHE_HOME or ~/.cache: made if it is not there, this user's, and closed to all others.

    Raises OSError where it cannot be made, or where another user could have put something into it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # as where a container runs under a number without a name
        raise OSError("no home directory; XDG_CACHE_HOME names another place for what is kept")
    place = Path(home).absolute() / "fluid-eval"
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        _check(place, place.lstat(), stat.S_ISDIR)
        for above in Path(os.path.realpath(place)).parents:
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:  # whoever may rename it may put another in its place
                raise OSError(f"{above} can be written by everybody; XDG_CACHE_HOME names another place")
        place.chmod(0o700)  # earlier versions let others read it
    return place


def kept(name: str) -> Path | None:
    """A file of that folder; None where it is not there. Raises OSError where another user may have written it."""
    file = folder() / name
    try:
        found = file.lstat()
    except FileNotFoundError:
        return None
    if os.name == "posix":
        _check(file, found, stat.S_ISREG)
    return file


def _check(place: Path, found: os.stat_result, kind: Callable[[int], bool]) -> None:
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise OSError(f"{place} is not this user's alone; remove it, or name another place by XDG_CACHE_HOME")
