"""Putting a finished folder where another stood, and taking one away: nothing goes that was not written here.

What was written here is known by its name: shell patterns of file names, and of paths ("adapter/*": at any depth).
Whatever matches none of them is somebody else's, and stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import ConfigError


def foreign(folder: Path, ours: Sequence[str]) -> str | None:
    """A path inside the folder that matches none of the patterns; None if there is none, or no folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not _matches(name, ours):
            return name
    return None


def is_free(folder: Path) -> bool:
    """Whether nothing stands there, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def check_ours(name: str, folder: Path, ours: Sequence[str]) -> None:
    """Raise ConfigError, naming the setting and what was found, unless the folder holds files of ours alone."""
    if not folder.is_dir():
        raise ConfigError(f"{name}={folder}: is no folder; choose another")
    if (theirs := foreign(folder, ours)) is not None:
        raise ConfigError(
            f"{name}={folder} holds {theirs}, which was not written here; choose another, or move it away"
        )


def remove(folder: Path, ours: Sequence[str]) -> None:
    """Remove what matches the patterns, and the folder if nothing else is in it. A link goes, not what it leads to."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside a folder before the folder
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        elif _matches(path.relative_to(folder).as_posix(), ours):
            path.unlink(missing_ok=True)
    _remove_empty(folder)


def swap(draft: Path, target: Path, ours: Sequence[str]) -> None:
    """Put the finished draft in the target's place by renames; what stood there stands again if that fails.

    The target must be free or hold files of ours alone (see `check_ours`). Of what is put aside, only those are
    removed.
    """
    os.chmod(draft, 0o755)  # mkdtemp makes it private
    aside = draft.with_name(draft.name + "-old")
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(draft, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    remove(aside, ours)


def discard(draft: Path) -> None:
    """Remove a folder this process made under a name of its own, with all that is in it."""
    shutil.rmtree(draft, ignore_errors=True)


def _matches(name: str, ours: Sequence[str]) -> bool:
    return any(("/" in pattern or "/" not in name) and fnmatchcase(name, pattern) for pattern in ours)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
