"""The exceptions a user is meant to read: one line, no traceback."""

from __future__ import annotations

import re

MOST_REASON = 400
"""Characters of a library's message that are shown."""


class ConfigError(ValueError):
    """A setting, path or file that cannot work. The message names the value and the way out, on one line."""


class RunError(RuntimeError):
    """Work that could not be finished through no fault of the settings. What is done is kept."""


def reason(error: BaseException) -> str:
    """Why a library refused, on one line.

    Long messages open with advice and name the cause further down, as "SomeError: why". Elsewhere it is the first line,
    with the next where the first only announces it ("Error(s) in loading state_dict for X:").
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip()] or [type(error).__name__]
    causes = [line for line in lines[1:] if re.match(r"\w*( [Ee]rror|Error|Exception): \S", line)]
    shown = causes[-1:] if causes and not lines[0].endswith(":") else lines[:1] + causes[-1:]
    for line in lines[1:]:
        if not shown[-1].endswith(":"):
            break
        shown.append(line)
    return " ".join(shown)[:MOST_REASON]
