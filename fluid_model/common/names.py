"""Did you mean: the one place that compares a mistyped name with known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLOSE = 3
"""Names proposed at most."""


def close_to(name: object, known: Iterable[object], alike: float = 0.65) -> list[str]:
    """Known names that look like this one, the closest first; small and capital letters are alike.

    alike: difflib's ratio in [0, 1], from which a name counts as close.
    """
    by_lower = {str(one).lower(): str(one) for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(str(name).lower(), by_lower, CLOSE, alike)]


def did_you_mean(name: object, known: Iterable[object], alike: float = 0.65, prefix: str = "") -> str:
    """`did you mean a, b? ` to stand inside a message; empty where nothing known looks like the name.

    prefix: written before each name proposed.  alike: see `close_to`.
    """
    close = close_to(name, known, alike)
    return f"did you mean {', '.join(prefix + one for one in close)}? " if close else ""
