"""Programs run elsewhere, end in time and cannot claim to have passed by leaving early."""

from __future__ import annotations

import time

import pytest

from fluid_eval.data import load_rows
from fluid_eval.sandbox import run_program


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("print('noise')", "passed"),
        ("assert 1 + 1 == 3", "failed"),
        ("def f(:", "failed"),
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("raise KeyboardInterrupt", "failed"),
        ("x = 'a' * (3 << 30)", "failed"),
        ("f = lambda: f()\nf()", "failed"),
        ("open('big', 'w').write('a' * (8 << 20))", "failed"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("s = '\\ud800'\nassert len(s) == 1", "passed"),
    ],
)
def test_verdicts(program, reason):
    verdict = run_program(program, timeout=1.0)
    assert (verdict.reason, verdict.passed) == (reason, reason == "passed")
    assert verdict.seconds < 3


def test_it_runs_in_another_process_without_our_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    import os

    assert run_program(f"import os; assert os.getpid() != {os.getpid()} and 'SECRET_TOKEN' not in os.environ").passed


def test_children_do_not_outlive_the_verdict(tmp_path):
    mark = tmp_path / "mark"
    late = f"os.closerange(0, 64); time.sleep(1); open({str(mark)!r}, 'w')"
    assert run_program(f"import os, time\nif os.fork() == 0:\n    {late}").passed
    time.sleep(1.5)
    assert not mark.exists()


def test_canonical_solutions_pass_and_broken_ones_do_not():
    for row in load_rows("humaneval", "test", None)[:12]:
        tests = f"\n{row['test']}\ncheck({row['entry_point']})\n"
        assert run_program(row["prompt"] + row["canonical_solution"] + tests).passed
        assert not run_program(row["prompt"] + "    return None\n" + tests).passed
