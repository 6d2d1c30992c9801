"""Runs a command as an ordinary user, for tests that run as root.

    python -m tests.ordinary FOLDER WORDS...        FOLDER: for its files; it becomes the user's

What Python, its packages and this checkout need may lie where only root may look: there, in mounts of its own, it
finds them at the same place in an otherwise empty folder.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fluid_eval.sandbox import spaces

USER = 54321
"""Nobody's: what is not open to all is closed to it."""


def needed() -> list[Path]:
    """Folders that a test needs to read."""
    folders = {sys.base_prefix, sys.prefix, str(Path(__file__).parents[1]), *filter(os.path.isdir, sys.path)}
    return sorted({Path(os.path.realpath(folder)) for folder in folders} | {Path(sys.prefix)})


def closed(folder: Path) -> Iterator[Path]:
    """Folders above that others may not go through."""
    return (above for above in reversed(folder.parents) if not above.stat().st_mode & stat.S_IXOTH)


def open_up(folders: list[Path]) -> None:
    """In mounts of this process's own, put an empty folder over each closed one, and in it what is needed of it."""
    spaces.own_mounts()
    hidden = {
        above: [f for f in folders if above in f.parents] for folder in folders for above in [*closed(folder)][:1]
    }
    with tempfile.TemporaryDirectory() as stash:
        for above, within in hidden.items():
            kept = []
            for number, folder in enumerate(within):
                if not any(other in folder.parents for other in within):
                    kept.append((Path(stash, f"{above.name}-{number}"), folder))
                    kept[-1][0].mkdir()
                    spaces._mount(str(folder), str(kept[-1][0]), None, spaces._BIND)
            spaces._mount("tmpfs", str(above), "tmpfs", spaces._NO_DEV, "mode=755")
            for source, folder in kept:
                folder.mkdir(parents=True)
                spaces._mount(str(source), str(folder), None, spaces._BIND)
                spaces._call("umount2", str(source).encode(), spaces._DETACH)


def become(folder: str, words: list[str]) -> None:
    """Raises OSError where it cannot."""
    open_up(needed())
    os.chown(folder, USER, USER)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    os.environ.update(HOME=folder, TMPDIR=folder, PYTHONDONTWRITEBYTECODE="1")
    os.execv(words[0], words)


if __name__ == "__main__":
    try:
        become(sys.argv[1], sys.argv[2:])
    except OSError as error:
        sys.exit(f"cannot become an ordinary user here: {error}")
