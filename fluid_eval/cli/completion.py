"""Shell completion by argcomplete: commands, flags, and the names that can be listed without torch or lm-eval.

eval "$(register-python-argcomplete fluid-eval)"      # bash; zsh the same, after: autoload -U bashcompinit
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable

Names = Callable[[str], Iterable[str]]
"""Text typed so far -> proposals."""


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit, where it is the shell that asks. Otherwise nothing is imported."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    attach(parser)
    argcomplete.autocomplete(parser)


def attach(parser: argparse.ArgumentParser) -> None:
    """Give every argument of every command that takes known names its proposals."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                attach(command)
        elif names := _COMPLETERS.get((parser.prog.split()[-1], action.dest)) or _COMPLETERS.get(("", action.dest)):
            action.completer = lambda prefix, names=names, **_: list(names(prefix))  # type: ignore[attr-defined]


def _models(prefix: str) -> Iterable[str]:
    """Bundled checkpoints, then files and folders."""
    from argcomplete.completers import FilesCompleter

    from ..common.bundled import bundled

    return [*bundled(), *FilesCompleter()(prefix)]


def _decoders(prefix: str) -> Iterable[str]:
    from fluid_model.registry import decoders

    return decoders()


def _settings(prefix: str) -> Iterable[str]:
    from ..common.settings_list import all_settings

    return [one.name for one in all_settings()]


def _assignments(prefix: str) -> Iterable[str]:
    """Settings up to their equals sign."""
    return [f"{name}=" for name in _settings(prefix)]


def _profiles(prefix: str) -> Iterable[str]:
    from ..benchmarks.profiles import known_profiles

    return known_profiles()


def _tasks(prefix: str) -> Iterable[str]:
    """This package's tasks, behind the last comma."""
    from ..benchmarks.task_index import of_this_package

    before, comma, _ = prefix.rpartition(",")
    return [before + comma + name for name in of_this_package()]


_COMPLETERS: dict[tuple[str, str], Names] = {
    ("", "model"): _models,
    ("", "parent"): _models,
    ("", "decoder"): _decoders,
    ("", "set"): _assignments,
    ("", "sweep"): _assignments,
    ("", "profile"): _profiles,
    ("", "tasks"): _tasks,
    ("settings", "name"): _settings,
    ("tasks", "pattern"): lambda prefix: _tasks(""),
}
"""(command, or any; argument) -> its names."""
