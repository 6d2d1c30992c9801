"""Programs that try to pass without solving the problem, to reach out of their jail, or to hurt the machine.

The problem is to add two numbers. `FORGED` programs are whole: they never add, and pass only if the verdict can be
forged. `REACHED` are bodies of `attack()`: `program` adds rightly only if that achieves what it attempts, so that
"passed" always means that the attack worked. SECRET, PORT, PID, MARK, DATA and SOCKET stand for things of the host's.
"""

from __future__ import annotations

import textwrap

from . import forged, reached

SETUP = "def doubled(x):\n    return 2 * x\n\n\ndef add(a, b):\n    pass\n"
TESTS = """
def check(candidate):
    import math
    assert candidate(2, 3) == 5
    for a, b in ((10, 20), (7, -7), (1.5, 2.5)):
        assert math.isclose(candidate(a, b), a + b) and abs(candidate(a, b) - a - b) < 1e-9
    assert isinstance(candidate(1, 1), int) and all(candidate(n, 1) == n + 1 for n in range(3))
    assert doubled(candidate(4, 4)) == 16

check(add)
"""
RIGHT = "def add(a, b):\n    return a + b\n"

_CALL = """
def call(number, *values):
    import ctypes, platform
    if platform.machine() != "x86_64": return -1
    return ctypes.CDLL(None).syscall(number, *values)
"""
_FRAME = """{call}
def attack():
{body}

def add(a, b):
    try:
        done = attack()
    except BaseException:
        done = False
    return a + b if done else None
"""

FORGED = {
    f"{kind}: {tried}": textwrap.dedent(text).strip()
    for kind, some in forged.FORGED.items()
    for tried, text in some.items()
}
REACHED = {
    f"{kind}: {tried}": _FRAME.format(call=_CALL, body=textwrap.indent(body, "    "))
    for kind, some in reached.REACHED.items()
    for tried, body in some.items()
}
QUICK = (
    "leaves: sys.exit(0) when called", "lies about equality: int equal to all", "looks for the verdict: frames above",
    "patches what judges: builtins abs, all, any, isinstance, len", "writes to pipes: a verdict on every descriptor",
    "takes too much: memory at once", "reads: a file of the user's", "calls others: TCP on loopback",
    "touches processes: a daemon", "takes too much: time: a loop",
)  # fmt: skip
"""Those that the default test suite runs."""


_EVERYWHERE = """
def everywhere(data):
    import os
    for number in range(3, 16):
        try: os.write(number, data)
        except OSError: pass
"""


def program(text: str, host: dict[str, object]) -> str:
    """An attack on these things of the host's."""
    return "".join(f"{name} = {value!r}\n" for name, value in host.items()) + _EVERYWHERE + text
