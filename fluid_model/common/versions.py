"""`--version`: this package and the libraries that numbers depend on, from their metadata; imports none of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from typing import Any

DISTRIBUTION = "fluid-eval"
"""The installed distribution: it holds both packages and both commands."""


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is missing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def version_line(command: str, libraries: Sequence[str]) -> str:
    """`fluid-eval 0.1.0 (torch 2.13.0, transformers 5.23.0)`."""
    versions = ", ".join(f"{name} {installed(name) or 'missing'}" for name in libraries)
    return f"{command} {installed(DISTRIBUTION) or 'from source, not installed'} ({versions})"


class ShowVersions(argparse.Action):
    """A flag that prints `version_line` and exits with 0. The metadata are read when it is used."""

    def __init__(self, option_strings: Sequence[str], dest: str, libraries: Sequence[str]) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print versions and exit")
        self.libraries = libraries

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        print(version_line(parser.prog, self.libraries))
        parser.exit()
