"""Programs that try to pass without solving the problem, to reach out of their jail, or to hurt the machine.

The problem is to add two numbers. `FORGED` programs are whole: they never add, and pass only if the verdict can be
forged. `REACHED` are bodies of `attack()`: `program` adds rightly only if that achieves what it attempts, so that
"passed" always means that the attack worked. SECRET, PORT, PID, MARK, DATA, SOCKET and SHARED stand for things of the host's.
"""

from __future__ import annotations

import textwrap
import zlib

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


HONEST = {
    "adds": RIGHT,
    "asyncio": """
        import asyncio
        async def add(a, b): return (await asyncio.gather(asyncio.to_thread(int, a), asyncio.sleep(0)))[0] + b
        add_later, add = add, lambda a, b: a + b if asyncio.run(add_later(2, 3)) == 5 else None""",
    "locks of processes": """
        import multiprocessing
        lock, count = multiprocessing.Lock(), multiprocessing.Value("i", 0)
        def add(a, b):
            with lock: return a + b + count.value""",
    "a pool of threads": """
        from multiprocessing.pool import ThreadPool
        def add(a, b):
            with ThreadPool(3) as pool: return sum(pool.map(lambda n: n, [a, b]))""",
    "a pair of sockets": """
        import socket
        one, other = socket.socketpair()
        one.sendall(b"5")
        add = (lambda a, b: a + b) if other.recv(1) == b"5" else None""",
    "a deep stack": """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(256 << 20)
        def deep(n): return 0 if n == 0 else deep(n - 1)
        def add(a, b):
            held = []
            thread = threading.Thread(target=lambda: held.append(deep(10_000)))
            thread.start()
            thread.join()
            return a + b + held[0]""",
    "a database": """
        import sqlite3
        base = sqlite3.connect("x.db")
        base.execute("create table t (n)")
        base.commit()
        def add(a, b): return base.execute("select ? + ?", (a, b)).fetchone()[0]""",
    "files of its own": """
        import fcntl, os, shutil, tempfile
        with tempfile.NamedTemporaryFile("w") as file:
            file.write("5")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX)
            shutil.copyfile(file.name, "copy")
        add = (lambda a, b: a + b) if open("copy").read() == "5" else None""",
    "signals, clocks and selectors": """
        import os, selectors, signal, time
        got = []
        signal.signal(signal.SIGALRM, lambda *_: got.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
        chosen, (read, write) = selectors.DefaultSelector(), os.pipe()
        chosen.register(read, selectors.EVENT_READ)
        os.write(write, b"x")
        add = (lambda a, b: a + b) if got and chosen.select(1) else None""",
}
"""Programs that do add, with parts of the standard library that ask the kernel for more than most."""
HONEST = {f"honest: {what}": textwrap.dedent(text).strip() for what, text in HONEST.items()}

_EVERYWHERE = """
def everywhere(data):
    import os
    for number in range(3, 16):
        try: os.write(number, data)
        except OSError: pass
"""


def program(text: str, host: dict[str, object]) -> str:
    """An attack on these things of the host's."""
    named = f"import ctypes\nctypes.CDLL(None).prctl(15, {mark(text).encode()!r}, 0, 0, 0)\n"
    return named + "".join(f"{name} = {value!r}\n" for name, value in host.items()) + _EVERYWHERE + text


def mark(text: str) -> str:
    """The name its process gives itself, by which it is found if it is left."""
    return f"jailed{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
