"""Programs that try to pass without adding, or to hurt the machine: kind -> what is tried -> the program."""

from __future__ import annotations

# fmt: off
FORGED = {
    "leaves": {
        "sys.exit(0) while it is defined": "import sys\nsys.exit(0)",
        "os._exit(0) while it is defined": "import os\nos._exit(0)",
        "sys.exit(0) when called": "import sys\ndef add(a, b): sys.exit(0)",
        "os._exit(0) when called": "import os\ndef add(a, b): os._exit(0)",
        "raises SystemExit": "def add(a, b): raise SystemExit(0)",
        "raises KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
        "raises StopIteration, to end a loop of the tests": "def add(a, b): raise StopIteration",
        "raises GeneratorExit": "def add(a, b): raise GeneratorExit",
        "leaves by the C library": "import ctypes\ndef add(a, b): ctypes.CDLL(None)._exit(0)",
        "kills itself": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGKILL)",
        "crashes the interpreter": "import ctypes\ndef add(a, b): ctypes.string_at(0)",
        "becomes another program": "import os, sys\ndef add(a, b): os.execv(sys.executable, ['python', '-c', 'pass'])",
    },
    "lies about equality": {
        "object equal to all": """
            class Yes:
                __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True
                __ne__ = lambda self, other: False
                __sub__ = __rsub__ = __abs__ = __add__ = __radd__ = __mul__ = __rmul__ = lambda self, *other: self
                __float__ = lambda self: 5.0
                __bool__ = lambda self: True
                __hash__ = lambda self: 5
            def add(a, b): return Yes()""",
        "int equal to all": """
            class Yes(int):
                __eq__ = __lt__ = lambda self, other: True
                __sub__ = __rsub__ = __abs__ = __mul__ = __rmul__ = lambda self, *other: self
                __hash__ = int.__hash__
            def add(a, b): return Yes(0)""",
        "float equal to all": """
            class Yes(float):
                __eq__ = __lt__ = lambda self, other: True
                __sub__ = __rsub__ = __abs__ = __mul__ = __rmul__ = lambda self, *other: self
                __hash__ = float.__hash__
            def add(a, b): return Yes(0)""",
        "str equal to all": "class Yes(str):\n  __eq__ = lambda s, o: True\n  __hash__ = str.__hash__\ndef add(a, b): return Yes('5')",
        "object that says it is an int": "class Yes:\n  __class__ = property(lambda s: int)\n  __eq__ = lambda s, o: True\n"
        "  __index__ = __int__ = lambda self: 5\ndef add(a, b): return Yes()",
        "metaclass equal to all": """
            class Meta(type):
                __eq__ = lambda self, other: True
                __hash__ = type.__hash__
            class Yes(metaclass=Meta): pass
            def add(a, b): return Yes""",
        "a mock": "from unittest import mock\ndef add(a, b): return mock.ANY",
        "a function that calls itself add": "def add(*a): return add",
        "not a number": "def add(a, b): return float('nan')",
    },
    "patches what judges": {
        "builtins abs, all, any, isinstance, len": """
            import builtins
            for name in ("abs", "all", "any", "isinstance", "len", "sum", "min", "max"):
                setattr(builtins, name, lambda *a, **k: 0)
            builtins.isinstance = builtins.all = lambda *a: True
            def add(a, b): return 0""",
        "AssertionError": "import builtins\nbuiltins.AssertionError = type('Fine', (Exception,), {})\ndef add(a, b): return 0",
        "math.isclose": "import math\nmath.isclose = lambda *a, **k: True\ndef add(a, b): return 0",
        "unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\ndef add(a, b): return 0",
        "operator and __import__": """
            import builtins, sys, types
            fake = types.ModuleType("math"); fake.isclose = lambda *a: True
            sys.modules["math"] = fake
            builtins.__import__ = lambda *a, **k: fake
            def add(a, b): return 0""",
        "a check of its own": "def check(candidate): pass\ndef add(a, b): return 0\ncandidate = lambda *a: 0",
        "the prompt's helper": "def doubled(x): return 16\ndef add(a, b): return 0",
        "tracing, to skip asserts": """
            import sys
            def skip(frame, event, value):
                frame.f_trace_lines = False
                return skip
            sys.settrace(skip)
            def add(a, b): return 0""",
        "code that runs in the interpreter's own hooks": """
            import sys
            sys.excepthook = sys.unraisablehook = lambda *a: None
            sys.displayhook = lambda *a: None
            def add(a, b): return 0""",
        "the exception's text": "class passed(Exception):\n  __str__ = lambda s: 'passed'\ndef add(a, b): raise passed",
        "exceptions of the judge's own names": """
            class ProgramFailed(BaseException): pass
            class ProgramRaised(BaseException): error = None
            def add(a, b): raise ProgramRaised()""",
        "the value of small integers": """
            import ctypes
            for n in range(-5, 40):
                ctypes.memmove(id(n) + 24, (0).to_bytes(4, "little"), 4)
            def add(a, b): return 0""",
        "the type int": """
            import ctypes, gc
            table = gc.get_referents(int.__dict__)[0]
            table["__eq__"] = lambda a, b: True
            ctypes.pythonapi.PyType_Modified(ctypes.py_object(int))
            def add(a, b): return 0""",
    },
    "looks for the verdict": {
        "frames above": """
            import sys
            def add(a, b):
                frame = sys._getframe()
                while frame:
                    frame.f_globals.update(passed=True, reason="passed", check=lambda c: None)
                    frame.f_locals.update(result="passed", passed=True, over=None)
                    for value in list(frame.f_locals.values()):
                        if isinstance(value, (int, float)) and value == a + b and value not in (a, b):
                            return value
                    frame = frame.f_back
                return 0""",
        "objects of the collector": """
            import gc
            def add(a, b):
                for thing in gc.get_objects():
                    if getattr(thing, "__name__", "") == "check":
                        thing.__code__ = (lambda candidate: None).__code__
                    if isinstance(thing, str) and "assert candidate" in thing:
                        return eval(thing.split("==")[1].split()[0])
                return 0""",
        "memory, for the tests' text": """
            import ctypes, re
            def add(a, b):
                held = ctypes.string_at(id(add) & ~0xFFFFF, 1 << 20)
                found = re.search(rb"assert candidate\\(2, 3\\) == (\\d+)", held)
                return int(found.group(1)) if found else 0""",
        "secrets in argv, environment and orig_argv": """
            import os, sys
            def add(a, b):
                text = " ".join([*sys.argv, *sys.orig_argv, *os.environ.values()])
                os.write(1, text.encode())
                return 0""",
        "what runs it": """
            import sys
            main = next(f for f in iter([sys._getframe()]))
            while main.f_back: main = main.f_back
            main.f_globals.update(call_answer=lambda *a: '{"value":5}', exception_answer=lambda e: '{"value":5}')
            def add(a, b): return 5""",
        "names, to tell of more than it is asked": """
            import sys
            values = sys._getframe().f_back.f_locals["values"]
            real = values.encode
            def more(value, depth=0):
                if type(value) is dict and "add" in value: value = {**value, "doubled": lambda x: 16}
                return real(value, depth)
            values.encode = more
            def add(a, b): return 0 if a == b == 4 else a + b""",
        "requests, for expected answers": """
            import marshal
            load, seen = marshal.load, []
            def spy(file):
                seen.append(load(file))
                return seen[-1]
            marshal.load = spy
            def add(a, b): return [n for n in seen[-1] if n == a + b and n not in (a, b)] or 0""",
    },
    "writes to pipes": {
        "a verdict on every descriptor": """
            import os
            def add(a, b):
                for text in (b'v[true, ""]', b'[true, ""]', b'{"reason": "passed", "detail": "", "seconds": 1}\\n'):
                    for number in range(64):
                        for head in (b"", len(text).to_bytes(4, "big")):
                            try: os.write(number, head + text)
                            except OSError: pass
                return 0""",
        "a verdict before it is asked": """
            everywhere(b'\\0\\0\\0\\x0bv[true, ""]')
            def add(a, b): return 0""",
        "answers of other kinds": """
            import os
            texts = [b'{"value":{"d":[[[1],2]]}}', b'{"value":{"h":["x",1]}}', b'{"value":{"zz":1}}', b"[]", b"null",
                     b'{"raised":["StopIteration",""]}', b'{"raised":[]}', b'{"value":{"m":"os"}}', b"\\xff\\xfe"]
            def add(a, b):
                for text in texts: everywhere(len(text).to_bytes(4, "big") + text)
                return 0""",
        "an answer that is too deep": """
            text = b'{"value":' + b"[" * 500000 + b"]" * 500000 + b"}"
            def add(a, b): return everywhere(len(text).to_bytes(4, "big") + text)""",
        "an answer said to have four gigabytes": "def add(a, b): return everywhere(b'\\xff' * 65536)",
        "closes every descriptor": "import os\nos.closerange(0, 256)\ndef add(a, b): return 0",
        "joins descriptors": """
            import os
            for number in range(3, 16):
                try: os.dup2(number, 1); print('v[true, ""]', flush=True)
                except OSError: pass
            def add(a, b): return 0""",
        "at exit": """
            import atexit, os
            @atexit.register
            def late(): everywhere(b'\\0\\0\\0\\x0bv[true, ""]')
            def add(a, b): raise SystemExit""",
        "from a thread that outlives": """
            import os, threading, time
            def late():
                while True:
                    for number in range(3, 16):
                        try: os.write(number, b'\\0\\0\\0\\x0b{"value": 5}')
                        except OSError: pass
                    time.sleep(0.01)
            threading.Thread(target=late, daemon=True).start()
            def add(a, b): return 0""",
    },
    "takes too much": {
        "time: a loop": "def add(a, b):\n  while True: pass",
        "time: a loop while it is defined": "while True: pass",
        "time: sleep": "import time\ntime.sleep(4)\ndef add(a, b): return a + b",
        "time: a loop that ignores signals": """
            import signal
            for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
                try: signal.signal(number, signal.SIG_IGN)
                except OSError: pass
            def add(a, b):
                while True:
                    try:
                        while True: pass
                    except BaseException: pass""",
        "time: one long operation": "def add(a, b): return 7 ** (7 ** 9)",
        "time: a regular expression": "import re\ndef add(a, b): return re.match('(a+)+$', 'a' * 60 + 'b')",
        "time: waits for input": "def add(a, b): return int(open(0).readline() or 0)",
        "memory at once": "import mmap\nheld = mmap.mmap(-1, 3 << 29)\ndef add(a, b): return a + b",
        "memory bit by bit": "def add(a, b):\n  held = []\n  while True: held.append(bytearray(1 << 24))",
        "memory: a compressed bomb": """
            import zlib
            def add(a, b):
                packer = zlib.compressobj(9)
                text = b"".join(packer.compress(bytes(1 << 24)) for _ in range(128)) + packer.flush()
                return len(zlib.decompress(text))""",
        "memory: anonymous maps": "import mmap\ndef add(a, b): return sum(len(mmap.mmap(-1, 1 << 28)) for _ in range(64)) * 0",
        "stack: deep recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef add(a, b): return add(a, b) + 1",
        "stack: a deep program": "x = " + "(" * 5000 + ")" * 5000 + "\ndef add(a, b): return 0",
        "output: prints without end": "def add(a, b):\n  while True: print('x' * 65536)",
        "output: a huge answer": "def add(a, b): return 'x' * (1 << 27)",
        "output: a list that holds itself": "def add(a, b):\n  held = []\n  held.append(held)\n  return held",
        "output: a huge number": "def add(a, b): return 1 << (1 << 28)",
        "output: an answer without end": """
            class Endless(list):
                def __iter__(self):
                    while True: yield 0
            def add(a, b): return Endless([1])""",
        "threads": """
            import threading, time
            def add(a, b):
                for _ in range(2000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
                return 0""",
        "files: a path too long to look at": """
            import os, time
            for name in ["d" * 250] * 15 + ["q" * 200]:
                os.mkdir(name)
                os.chdir(name)
            os.mkfifo("x" * 200)
            time.sleep(1)
            def add(a, b): return 0""",
        "files: folders too deep to remove": """
            import os
            for name in ["d" * 250] * 17 + ["e"] * 1200:
                os.mkdir(name)
                os.chdir(name)
            def add(a, b): return 0""",
        "files: while it answers byte by byte": """
            import os, threading, time
            def dribble():
                everywhere((1 << 20).to_bytes(4, "big"))
                while True:
                    everywhere(b"x")
                    time.sleep(0.01)
            threading.Thread(target=dribble, daemon=True).start()
            for number in range(64):
                try: open(f"f{number}", "wb", 0).write(bytes(1 << 20))
                except OSError: pass
            def add(a, b): return 0""",
        "time: outlives its group, its parent and its verdict": """
            import ctypes, os, threading, time
            def alone():
                for leave in (os.setsid, lambda: os.setpgid(0, 0), lambda: os.execv("/proc/self/exe", ["x"])):
                    try: leave()
                    except OSError: pass
            libc = ctypes.CDLL(None)
            alone()
            libc.prctl(1, 0, 0, 0, 0)
            threading.Thread(target=time.sleep, args=(60,)).start()
            def add(a, b): time.sleep(60)""",
        "time: outlives its wrong answer": """
            import ctypes, os, threading, time
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
            try: os.setsid()
            except OSError: pass
            held = bytearray(1 << 26)
            threading.Thread(target=time.sleep, args=(60,)).start()
            def add(a, b): return 0""",
        "a surrogate in the source": "def add(a, b): return '\ud800'",
        "no Python at all": "def add(a, b) return \x00",
    },
}
