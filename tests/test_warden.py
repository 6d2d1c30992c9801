"""Wardens: whatever a program does is its own verdict, and nothing of theirs outlives them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from fluid_eval.benchmarks.humaneval_samples import outcomes_of
from fluid_eval.sandbox import Trial, child, judge, ladder, pool, tiers, warden
from fluid_eval.sandbox.files import interpreter_files
from fluid_eval.sandbox.ladder import tier_named
from fluid_eval.sandbox.pool import JudgePool
from fluid_eval.sandbox.tiers import Sandlock, Unsafe
from fluid_model.common.errors import ConfigError

ADD = "def add(a, b):\n    return a + b\n"


def test_what_one_trial_leaves_unread_is_not_the_nexts_answer(monkeypatch):
    asked = '    defined = channel.answer("names")["names"]\n'
    source = Path(judge.__file__).read_text()
    assert asked in source
    late = source.replace(asked, "    compile(tests, '', 'exec')\n" + asked)  # a verdict before the answer is taken
    monkeypatch.setattr(
        warden, "_code", lambda name: compile(late if name == "judge.py" else child_source(), name, "exec")
    )
    here = warden.Warden(tier_named(ladder.chosen(allow_unsafe=True), interpreter_files()))
    try:
        assert here.judge(ADD, "", "def f(:", "", 2.0)[0] == "failed"
        assert here.judge(ADD, "", "assert add(1, 2) == 3", "", 2.0) == ("passed", "")
    finally:
        here.close()


DEEP = """import os, time
def f():
    for n in range(17):
        os.mkdir('d' * 250)
        os.chdir('d' * 250)
    for n in range(1200):
        os.mkdir('e')
        os.chdir('e')
    os.mkfifo('x' * 200)
    time.sleep(0.3)
"""
ENDS_ITS_JUDGE = """import os, signal
def f():
    for n in map(int, filter(str.isdigit, os.listdir('/proc'))):
        try:
            if b'sandbox.warden' in open(f'/proc/{n}/cmdline', 'rb').read() and os.getsid(n) == n and n == os.getppid():
                os.kill(n, signal.SIGKILL)
        except OSError: pass
    os.read(0, 1)
"""


@pytest.mark.parametrize("program", [DEEP, ENDS_ITS_JUDGE], ids=["depth", "end of the warden"])
def test_whatever_a_program_does_is_its_verdict(program):
    """Where nothing isolates it, so that it can."""
    with closing(JudgePool(Unsafe.name, 1)) as judges:
        got = outcomes_of(judges, [Trial(program, "f()\nassert 0", timeout=1.0), Trial(ADD, "assert add(1, 2) == 3")])
        folder = Path(judges.wardens[0]._folder)
        assert [v.reason for v in got] == ["failed", "passed"], got
    assert not folder.exists()


def test_what_cannot_be_looked_at_or_ended_is_the_programs_verdict(monkeypatch):
    here = warden.Warden(tier_named(Unsafe.name, interpreter_files()))
    monkeypatch.setattr(tiers.Jailed, "overfull", lambda self: 1 / 0)
    started = here._tier.start

    def start(*, processes: bool) -> tiers.Jailed:
        jailed = started(processes=processes)
        return replace(jailed, end=lambda: (jailed.end(), [][0]))

    monkeypatch.setattr(here._tier, "start", start)
    try:
        here._open_judge()
        with monkeypatch.context() as patch:
            patch.setattr(warden.FolderWatch, "check", lambda self, **_: self._jailed and 1 / 0)
            outcome = here.judge(ADD, "", "assert add(1, 2) == 3", "", 2.0)
            assert outcome == ("failed", "its judge gave up: division by zero")
        monkeypatch.setattr(tiers.Jailed, "overfull", lambda self: False)
        assert here.judge(ADD, "", "assert add(1, 2) == 3", "", 2.0) == ("passed", "")
    finally:
        here.close()


def test_interpreters_that_ended_before_a_program_had_begun_are_replaced():
    here = warden.Warden(tier_named(ladder.chosen(allow_unsafe=True), interpreter_files()))
    try:
        for n in range(2):
            assert here.judge(ADD, "", f"assert add(1, {n}) == {n + 1}", "", 2.0) == ("passed", "")
            here._judge.end()
            here._next.end()
            (here._judge, here._next) = (None, None) if n else (dead(here._judge), dead(here._next))
            here._to_judge = None if n else warden.JailChannel(here._judge, here._watch)
    finally:
        here.close()


def dead(jailed: tiers.Jailed) -> tiers.Jailed:
    """One whose process has ended."""
    (stdout, write), (read, stdin) = os.pipe(), os.pipe()
    os.close(write)
    os.close(read)
    return tiers.Jailed(stdin, stdout, lambda: (os.close(stdin), os.close(stdout)))


def test_a_program_may_take_longer_than_a_warden_may_hang(monkeypatch):
    monkeypatch.setattr(pool, "HANGS", 30.0)
    with pool.WardenProcess(Unsafe.name) as place:
        assert place.judge(Trial(ADD, "assert add(1, 2) == 3")).passed
        monkeypatch.setattr(pool, "HANGS", 0.0)
        assert place.judge(Trial("import time\ndef f(): time.sleep(0.5)", "f()", timeout=20.0)).passed


@pytest.mark.skipif(sys.platform != "linux", reason="by a signal of Linux's")
def test_wardens_end_with_whoever_asks_them(tmp_path):
    program = "import time\ndef f(): time.sleep(60)"
    script = (
        f"from fluid_eval.sandbox.pool import Trial, WardenProcess\nw = WardenProcess({Unsafe.name!r})\nw._open()\n"
        f"print(w._process.pid, w._folder, flush=True)\nw.judge(Trial({program!r}, 'f()', timeout=60))"
    )
    asking = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert asking.stdout
    number, folder = asking.stdout.readline().split()
    until(lambda: len(list(Path(folder).iterdir())) == 3)  # judge, program and next
    asking.kill()
    asking.wait()
    asking.stdout.close()
    until(lambda: not Path(folder).exists() and not Path(f"/proc/{number}").exists())


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("timeout", [0.0, math.inf, math.nan])
def test_a_timeout_is_seconds(timeout):
    with pytest.raises(ConfigError, match="must be seconds above 0"):
        Trial(ADD, "", timeout=timeout)


def child_source() -> str:
    return Path(child.__file__).read_text()


DRIBBLES = """import os, threading, time
def dribble():
    data = (1 << 20).to_bytes(4, 'big')  # so many bytes are said to come
    while True:
        for n in range(3, 16):
            try: os.write(n, data)
            except OSError: pass
        time.sleep(0.01)
        data = b'x'
"""
FILLS = """import threading
def fill():
    for n in range(48):
        try:
            with open(str(n), 'wb') as file: file.write(bytes(1 << 19))
        except OSError: pass
"""
SILENT = f"{FILLS}fill()\nimport time\ntime.sleep(9)\n"
DRIBBLING = f"{DRIBBLES}threading.Thread(target=dribble, daemon=True).start()\n{SILENT}"
LATER = f"""{FILLS}import time
def later():
    time.sleep(0.2)
    fill()
def f(): threading.Thread(target=later, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "tests"),
    [(SILENT, ""), (DRIBBLING, ""), (LATER, "f()\nimport time\ntime.sleep(9)")],
    ids=["in silence", "while it answers byte by byte", "while the tests are at work"],
)
@pytest.mark.parametrize("name", [Unsafe.name, "sandlock"])
def test_a_folder_without_a_limit_is_watched_by_the_clock(name, program, tests):
    if name != Unsafe.name and (why := ladder.failure_of(Sandlock)):
        pytest.skip(f"{name} does not hold here: {why}")
    here = warden.Warden(tier_named(name, interpreter_files()))  # no mounts of its own in this process
    started = time.monotonic()
    try:
        assert here.judge(program, "", tests, "", 8.0) == ("failed", "the program filled its folder")
        assert time.monotonic() - started < 6
        assert here.judge(ADD, "", "assert add(1, 2) == 3", "", 2.0) == ("passed", "")
    finally:
        here.close()


STAYS = """import ctypes, os, threading, time
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)
for leave in (os.setsid, lambda: os.setpgid(0, 0)):
    try: leave()
    except OSError: pass
def other():
    libc.prctl(1, 0, 0, 0, 0)
    try: os.execv(EXECUTABLE, ["x", "-I", "-S", "-c", "import time; time.sleep(50)"])
    except OSError: time.sleep(50)
threading.Thread(target=other).start()
def f(): time.sleep(50)
"""


@pytest.mark.security
@pytest.mark.parametrize("tier", ladder.LADDER, ids=lambda tier: tier.name)
def test_a_killed_warden_takes_all_of_its_jails_along(tier):
    if why := ladder.failure_of(tier):
        pytest.skip(f"{tier.name} does not hold here: {why}")
    program = f"EXECUTABLE = {interpreter_files().executable!r}\n{STAYS}"
    with pool.WardenProcess(tier.name) as place:
        place._open()
        trial = Trial(program, "def g():\n    while True: pass\nf\ng()", timeout=50)
        place._process.stdin.write(json.dumps(asdict(trial)) + "\n")
        place._process.stdin.flush()
        of_warden = psutil.Process(place._process.pid)
        until(lambda: len(of_warden.children(recursive=True)) >= 4)  # program, next, judge and its fork
        time.sleep(0.3)
        below = of_warden.children(recursive=True)
        of_warden.kill()
        left = psutil.wait_procs(below, timeout=10)[1]
    assert not left


def test_verdicts_need_no_home(monkeypatch):
    """As where a container runs under a number without a name."""
    monkeypatch.delenv("HOME", raising=False)
    with pool.WardenProcess(ladder.chosen(allow_unsafe=True)) as place:
        assert place.judge(Trial("import os\ndef f(): return 'HOME' in os.environ", "assert not f()")).passed
