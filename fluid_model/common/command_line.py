"""The parser of both commands: errors in one line that names close flags, and `_` in a flag read as `-`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .names import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit code 2."""

    instead: Mapping[str, str] = {}
    """Flag of another tool -> what to write here instead; for messages about unknown flags."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does, with flags spelled with `-`."""
        return super().parse_known_args(None if args is None else [_hyphened(word) for word in args], namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does; an unknown flag is an error of the command that was named."""
        options, unknown = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        if unknown:
            self._command(options).error(self._command(options).unknown(unknown[0]))
        return options

    def unknown(self, word: str) -> str:
        """The message about a word that no flag or argument takes."""
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"{word!r} is one word too many"
        if flag in self.instead:
            return f"{flag} is no flag here; {self.instead[flag]}"
        return f"{flag} is no flag; {did_you_mean(flag, self._shown_flags())}"

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        if choice := re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message):
            name, value, known = choice.groups()
            names = [one.strip(" '") for one in known.split(",")]
            listed = f"known: {', '.join(names)}"
            message = f"{'command' if name == 'COMMAND' else name} {value!r} is unknown; "
            message += did_you_mean(value, names) or listed
        message = message.strip().rstrip(";")
        self.exit(2, f"{self.prog}: {message}{'' if message.endswith('?') else ';'} see {self.prog} --help\n")

    def _command(self, options: argparse.Namespace) -> Parser:
        """The parser of the named command; this one without commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices.get(getattr(options, action.dest), self)  # type: ignore[no-any-return]
        return self

    def _shown_flags(self) -> Iterable[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _hyphened(word: str) -> str:
    """`--batch_size=4` as `--batch-size=4`."""
    flag, sign, value = word.partition("=")
    return flag.replace("_", "-") + sign + value if flag.startswith("--") else word
