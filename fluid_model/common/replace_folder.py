"""Atomic replacement and removal of result folders. Only this project's own files are removed.

Own files are known by shell patterns of file names ("config.json") and of paths ("adapter/*": at any depth). All others
are the user's and stay.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import ConfigError


def foreign(folder: Path, ours: Sequence[str]) -> str | None:
    """The first path inside the folder that matches no pattern; None without any, or without a folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not _matches(name, ours):
            return name
    return None


def is_free(folder: Path) -> bool:
    """Whether the path is missing, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def check_ours(name: str, folder: Path, ours: Sequence[str]) -> None:
    """Raise ConfigError unless the folder holds own files only. name: of the setting that names the folder."""
    if not folder.is_dir():
        raise ConfigError(f"{name}={folder}: is no folder; choose another")
    if (path := foreign(folder, ours)) is not None:
        raise ConfigError(f"{name}={folder} holds {path}, which was not written here; choose another, or move it away")


def remove(folder: Path, ours: Sequence[str]) -> None:
    """Remove own files, and the folder if it is then empty. Symbolic links are removed, their targets are not."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*"), reverse=True):  # content before its folder
        if path.is_dir() and not path.is_symlink():
            _remove_empty(path)
        elif _matches(path.relative_to(folder).as_posix(), ours):
            path.unlink(missing_ok=True)
    _remove_empty(folder)


def swap(draft: Path, target: Path, ours: Sequence[str]) -> None:
    """Replace the target by the finished draft, by renames; the old target is restored if that fails.

    The target must be free or hold own files only (see `check_ours`).
    """
    os.chmod(draft, 0o755)  # mkdtemp creates it private
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
    """Remove a temporary folder of this process with all its content."""
    shutil.rmtree(draft, ignore_errors=True)


def _matches(name: str, ours: Sequence[str]) -> bool:
    return any(("/" in pattern or "/" not in name) and fnmatchcase(name, pattern) for pattern in ours)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
