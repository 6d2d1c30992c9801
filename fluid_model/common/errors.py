"""The exceptions a user is meant to read: one line, no traceback."""

from __future__ import annotations

import re

MAX_REASON = 400
"""Characters shown of a library's message."""


class ConfigError(ValueError):
    """An unusable setting, path or file. The message of one line names the value and the way out."""


class RunError(RuntimeError):
    """A failure that no setting caused, such as a full disk. Finished work is kept."""


def reason(error: BaseException) -> str:
    """The cause of a library's error, on one line.

    A long message opens with advice and names its cause further down, as "SomeError: why". Otherwise the first line is
    the cause, with the next ones where it ends in a colon ("Error(s) in loading state_dict for X:").
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip()] or [type(error).__name__]
    causes = [line for line in lines[1:] if re.match(r"\w*( [Ee]rror|Error|Exception): \S", line)]
    shown = causes[-1:] if causes and not lines[0].endswith(":") else lines[:1] + causes[-1:]
    for line in lines[1:]:
        if not shown[-1].endswith(":"):
            break
        shown.append(line)
    return " ".join(shown)[:MAX_REASON]
