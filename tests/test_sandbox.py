"""Programs are judged by their answers, in a process that they cannot reach; what crosses is plain data."""

from __future__ import annotations

import gzip
import inspect
import io
import itertools
import json
import math
import os
import random
import signal
import sys
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.sandbox import mutated
from fluid_eval.benchmarks import humaneval_samples
from fluid_eval.benchmarks.datasets import load_rows
from fluid_eval.benchmarks.humaneval_samples import load_problems, outcomes_of, pass_rates, score_file
from fluid_eval.cli import main
from fluid_eval.sandbox import Outcome, Trial, child, judge, ladder
from fluid_eval.sandbox.passing import build_predictions_instruct, pass_at_k, trial
from fluid_eval.sandbox.pool import JudgePool
from fluid_eval.sandbox.tiers import DISK, Jailed, Unsafe, remove
from fluid_model.common.errors import ConfigError

ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def judges():
    with closing(JudgePool(ladder.chosen(allow_unsafe=True))) as opened:
        yield opened


CASES = {
    "right": (ADD, "assert add(1, 2) == 3", "passed"),
    "wrong": (ADD, "assert add(1, 2) == 4", "failed: AssertionError"),
    "message": (ADD, "assert add(1, 2) == 4, 'Test 1'", "failed: Test 1"),
    "noise": ("print('noise')\n" + ADD, "assert add(1, 2) == 3", "passed"),
    "no Python": ("def f(:", "f()", "failed: invalid syntax (program.py, line 1)"),
    "missing": ("x = 1", "assert add(1, 2) == 3", "failed: name 'add' is not defined"),
    "leaves": ("import os\nos._exit(0)", "pass", "failed: the program ended its process"),
    "exits": (
        "def f(): raise SystemExit",
        "try:\n    f()\nexcept BaseException: pass",
        "failed: the program raised SystemExit",
    ),
    "loops": ("def f():\n    while True: pass", "f()", "timed out"),
    "tests that loop": (ADD, "while True: pass", "timed out"),
    "tests that end": (ADD, "import os\nos._exit(0)", "failed: the tests ended their process"),
    "exception by type": ("def f(): return {}['x']", "try:\n    f()\nexcept KeyError: pass\nelse: assert 0", "passed"),
    "exception of its own": ("class E(Exception): pass\ndef f(): raise E('why')", "f()", "failed: E: why"),
    "stops iteration": (
        "def f(x): raise StopIteration",
        "assert list(map(f, [1])) == []",
        "failed: the program raised StopIteration",
    ),
    "changes its argument": (
        "def f(x, y): x.append(9); y['a'] = {1}",
        "a, b = [1], {}\nf(a, b)\nassert a == [1, 9] and b == {'a': {1}}",
        "passed",
    ),
    "gives a generator": (
        "def f(): yield 1",
        "assert f() == [1]",
        "failed: the program gave a generator, which is no plain data",
    ),
    "generator gone through": ("def f(): yield from (1, 2)", "assert sum(f()) == 3 and len(list(f())) == 2", "passed"),
    "class": (
        "class A:\n    def __init__(self, n): self.n = n\n    def get(self, m): return [self.n, m]",
        "a = A(3)\nassert a.n == 3 and a.get(4) == [3, 4]",
        "passed",
    ),
    "object handed back": (
        "class P:\n    def __init__(self, n): self.n = n\ndef f(ps): return max(p.n for p in ps)",
        "assert f([P(1), P(5)]) == 5",
        "passed",
    ),
    "function handed over": (
        "def f(g): return g(1)",
        "assert f(lambda x: x) == 1",
        "failed: the tests hand over what is no plain data",
    ),
    "module of the program's": ("import math\ndef f(): return 4", "assert math.sqrt(f()) == 2", "passed"),
    "its own builtin is not the tests'": (
        "abs = lambda x: 0\ndef f(): return -9",
        "assert abs(f() - 1) < 1",
        "failed: AssertionError",
    ),
    "its own builtin is what they test": ("def abs(x): return 7", "assert abs(1) == 7", "passed"),
    "subclasses": (
        "from collections import Counter, OrderedDict\ndef f(): return Counter('aab')",
        "assert f() == {'a': 2, 'b': 1}",
        "passed",
    ),
    "an ordered dictionary's order": (
        "from collections import OrderedDict\ndef f():\n    d = OrderedDict(a=1, b=2); d.move_to_end('a'); return d",
        "assert list(f()) == ['b', 'a']",
        "passed",
    ),
    "tests that are no Python": (ADD, "def f(:", "failed: invalid syntax (tests.py, line 1)"),
    "annotations are looked up": (
        f"def g(x: List[int]): pass\n{ADD}",
        "add(1, 2)",
        "failed: name 'List' is not defined",
    ),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\ndef f(): return A(3).n",
        "assert f() == 3",
        "passed",
    ),
    "a kind of a built-in exception": (
        "import json\ndef f(): json.loads('{')",
        "try:\n    f()\nexcept ValueError as error:\n    assert str(error).startswith('Expecting')\nelse: assert 0",
        "passed",
    ),
    "an exception's parts": (
        "def f(): return {}['x']",
        "try:\n    f()\nexcept KeyError as error:\n    assert error.args == ('x',)\nelse: assert 0",
        "passed",
    ),
    "half a character": ("def f(): raise ValueError('\\ud800')", "f()", "failed: \\ud800"),
    "the truth of an object": (
        "import re\ndef f(x): return re.match('a', x)",
        "assert f('ab') and not f('b')",
        "passed",
    ),
    "its own tools of the tests": (
        "def sum(a, b): return 0\ndef all(x): return True",
        "assert all([sum(2, 3) == 5])",
        "failed: AssertionError",
    ),
    "only a tool of the tests": ("def all(x): return True", "assert all([sum([2, 3]) == 6])", "failed: AssertionError"),
    "two tools": (
        "def max(a): return 1",
        "assert all([max([0]) == 1])",
        "failed: the tests do not say which of all, max is the program's",
    ),
    "the prompt's own trouble": (ADD, "assert add(1, 2) == 3", "failed: division by zero", "1 / 0"),
    "after it": (ADD, "assert add(3, 2) == 5", "passed"),
    "a prompt that ends with a head": (ADD, "assert add(1, 2) == 3", "passed", "import math\n\ndef add(a, b):\n"),
    "says it is over": (
        """import os
for n in range(3, 64):
    try: os.write(n, b'\\0\\0\\0\\x0d{"over":null}')
    except OSError: pass""",
        "pass",
        "failed: the program broke the protocol",
    ),
}


def test_verdicts(judges):
    outcomes = outcomes_of(
        judges, [Trial(program, tests, *setup, timeout=2.0) for program, tests, _, *setup in CASES.values()]
    )
    assert {n: v.result for n, v in zip(CASES, outcomes, strict=True)} == {
        n: want for n, (_, _, want, *_) in CASES.items()
    }
    assert {verdict.isolation for verdict in outcomes} == {judges.tier}
    assert all(verdict.seconds < 30 for verdict in outcomes)


def test_a_prompts_helpers_are_the_prompts(judges):
    setup = "def double(x):\n    return 2 * x\n\ndef f(x):\n    pass\n"
    tests = "assert double(f(1)) == 4"
    right, liar = "def f(x):\n    return x + 1\n", "def f(x):\n    return 0\n\ndef double(x):\n    return 4\n"
    outcomes = outcomes_of(judges, [Trial(setup + program, tests, setup, "f") for program in (right, liar, "")])
    assert [verdict.passed for verdict in outcomes] == [True, False, False]


def test_canonical_solutions_pass_and_broken_ones_do_not(judges):
    rows = list(load_rows("humaneval", "test", None))[30:40]  # with find_zero and decode_cyclic, which use helpers
    for body, passes in (("canonical_solution", True), (None, False)):
        programs = [row["prompt"] + (row[body] if body else "    return None\n") for row in rows]
        outcomes = outcomes_of(judges, [trial(row, program) for row, program in zip(rows, programs, strict=True)])
        assert [verdict.passed for verdict in outcomes] == [passes] * 10


def test_a_trial_is_held_once_and_a_killed_process_is_replaced(judges):
    first = judges.submit(Trial(ADD, "assert add(2, 2) == 4"))
    assert first.result().passed
    assert judges.submit(Trial(ADD, "assert add(2, 2) == 4")) is first
    for place in judges.wardens:
        if place._process is not None:
            os.kill(place._process.pid, signal.SIGKILL)
    assert all(v.passed for v in outcomes_of(judges, [Trial(ADD, f"assert add({n}, 2) == {n + 2}") for n in range(4)]))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=20,
)  # fmt: skip


def line(answer: bytes) -> judge.ProgramChannel:
    """One that an answer has come in on."""
    return judge.ProgramChannel(io.BytesIO(len(answer).to_bytes(4, "big") + answer), os.open(os.devnull, os.O_WRONLY))


def same(one: object, other: object) -> bool:
    """Equal, types and signs of zero included."""
    return repr(one) == repr(other) or (one == other and type(one) is type(other))


@given(PLAIN)
@settings(max_examples=150)
def test_plain_data_crosses_as_it_is(value):
    text = child.Values().encode(value)
    assert same(line(b"").decode(json.loads(text)), value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abcdfhimtvz", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcdfhimstzB"), inner, max_size=2),
)


@given(st.binary(max_size=40) | st.builds(lambda v: json.dumps({"value": v, "after": v}).encode(), JSON))
@settings(max_examples=300)
def test_no_answer_does_anything_but_fail_or_be_plain_data(answer):
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return type(value) is dict and all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple | set | frozenset):
            return all(map(plain, value))
        return type(value) in (str, int, float, complex, bytes, bytearray, bool, type(None), judge.Handle)

    held_line = line(answer)
    try:
        assert plain(held_line.answer("value")["value"])
    except judge.ProgramFailed:
        assert held_line.failure
    finally:
        os.close(held_line._answers)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (5, 2, 1), (5, 2, 3), (6, 6, 2), (6, 1, 6), (7, 0, 4)])
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert math.isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)


def test_samples_are_scored_in_human_evals_form(judges, tmp_path):
    problems = dict(list(load_problems(None).items())[:2])
    one, two = problems
    right = {name: problem["canonical_solution"] for name, problem in problems.items()}
    samples = [
        {"task_id": one, "completion": right[one], "note": 1}, {"task_id": two, "completion": "    return 0"},
        {"task_id": one, "completion": "    return 1 +"}, {"task_id": two, "completion": right[two]},
        {"task_id": one, "completion": "    x"},
    ]  # fmt: skip
    file = tmp_path / "samples.jsonl"
    file.write_text("\n\n".join(map(json.dumps, samples)) + "\n")
    rates, fewest = score_file(file, problems, [1, 2, 3], judges)
    assert fewest == 2
    assert rates == pytest.approx({"pass@1": (1 / 3 + 1 / 2) / 2, "pass@2": (2 / 3 + 1) / 2})
    rows = [json.loads(row) for row in (tmp_path / "samples.jsonl_results.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == [True, False, False, True, False]
    assert (rows[0]["note"], rows[0]["result"]) == (1, "passed")
    assert rows[4]["result"] == "failed: name 'x' is not defined"
    for bad, why in (
        ('{"task_id": "HumanEval/0"}', ":1: no text 'completion'"), ("[]", "no text 'task_id'"),
        ("{", "not JSON"), ("", "no samples"), ('{"task_id": "x", "completion": ""}', "'x' is no problem"),
        (json.dumps(samples[0]), "1 of 2 problems have no sample"),
    ):  # fmt: skip
        file.write_text(bad)
        with pytest.raises(ConfigError, match=why):
            score_file(file, problems, [1], judges)


def test_samples_that_cannot_be_read_are_refused_by_name(judges, tmp_path):
    sample = b'{"task_id": "a", "completion": "    return 0"}\n'
    problems = {
        "a": {"task_id": "a", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 0"}
    }
    for name, content, why in (
        ("digits.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", ":1: not JSON"),
        ("damaged.jsonl.gz", gzip.compress(sample)[:10] + b"\xff" * 30, "cannot be read"),
        ("deep.jsonl", b"[" * 100_000, ":1: not JSON: nested too deep"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}.*{why}"):
            score_file(tmp_path / name, problems, [1], judges)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + sample)
    assert score_file(tmp_path / "marked.jsonl", problems, [1], judges).rates == {"pass@1": 1.0}


def test_results_are_written_whole_or_not_at_all(judges, tmp_path, monkeypatch, capsys):
    samples, results = tmp_path / "s.jsonl", tmp_path / "s.jsonl_results.jsonl"
    samples.write_text('{"task_id": "HumanEval/0", "completion": ""}\n')
    results.write_text("earlier\n")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(humaneval_samples, "outcomes_of", interrupted)
    monkeypatch.setattr(ladder, "chosen", lambda **_: Unsafe.name)
    assert main.main(["score", str(samples), "--incomplete", "--workers", "1"]) == 130
    assert "no results were written" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [samples.name, results.name]
    assert results.read_text() == "earlier\n"
    monkeypatch.setattr(
        humaneval_samples,
        "outcomes_of",
        lambda judges, trials: [Outcome("passed", "", 0.0, Unsafe.name) for _ in trials],
    )
    assert main.main(["score", str(samples), "--incomplete", "--workers", "1", "--k", "1,10"]) == 0
    printed = capsys.readouterr()
    assert "pass@10 cannot be estimated: a problem has only 1 sample" in printed.err
    assert "pass@1 " in printed.out
    assert json.loads(results.read_text())["passed"]
    monkeypatch.setattr(humaneval_samples, "outcomes_of", lambda *_: pytest.fail("nothing can come of it"))
    assert main.main(["score", str(samples), "--incomplete", "--k", "10,100"]) == 2
    printed = capsys.readouterr()
    assert "pass@10, pass@100 cannot be estimated: a problem has only 1 sample; pass --k 1" in printed.err
    assert not printed.out


def test_no_programs_give_no_rates():
    assert pass_rates({}, [1]) == pass_rates({"0": []}, [1]) == {}


def test_code_is_refused_where_nothing_isolates_it(monkeypatch):
    monkeypatch.setattr(
        ladder,
        "strongest_tier",
        lambda: ladder.IsolationHere(None, (("sandlock", "absent"), ("bubblewrap", "no bwrap"))),
    )
    with pytest.raises(
        ConfigError, match=r"sandlock: absent; bubblewrap: no bwrap.*apt install bubblewrap.*--allow-unsafe"
    ):
        ladder.chosen(allow_unsafe=False)
    assert ladder.chosen(allow_unsafe=True).startswith("none")
    monkeypatch.setattr("sys.platform", "darwin")
    assert ladder.failure_of(ladder.LADDER[0]) == "needs Linux"


def test_mutations_are_seeded_and_change_the_function_alone():
    source = "def helper(x):\n    return x + 1\n\ndef f(x):\n    return helper(x) * 2 if x > 3 else 0\n"
    mutants = {mutated(source, "f", random.Random(seed)) for seed in range(20)}
    assert len(mutants) > 4
    assert all("return x + 1" in one and one.split("def f")[1] != source.split("def f")[1] for one in mutants)
    assert mutated(source, "f", random.Random(3)) == mutated(source, "f", random.Random(3))


def test_the_probe_sees_what_is_open():
    why = ladder.failure_of(Unsafe)
    done = ("read a file", "change a file's mode", "connect to loopback", "make processes", "listen", "limit", "slow")
    assert all(what in why for what in done)


def overfull(folder) -> bool:
    return Jailed(0, 0, lambda: None, str(folder)).overfull()


@pytest.mark.parametrize("names", [["d"] * 100, ["d" * 250] * 15 + ["q" * 200, "x" * 200]], ids=["deep", "long"])
def test_no_folder_is_too_deep_to_be_looked_at_and_removed(tmp_path, monkeypatch, names):
    folder = tmp_path / "folder"
    monkeypatch.chdir(tmp_path)
    for name in ("folder", *names):
        os.mkdir(name)
        os.chdir(name)
    os.mkfifo("x" * 200)
    os.symlink(tmp_path, "link")
    os.chdir(tmp_path)
    (tmp_path / "kept").touch()
    assert overfull(folder)
    most = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack(0)) + 50)
        remove(str(folder))
    finally:
        sys.setrecursionlimit(most)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    remove(str(folder))


def test_a_folder_is_overfull_when_its_files_are(tmp_path):
    for n in range(7):
        (tmp_path / str(n)).write_bytes(bytes(DISK // 8))
    assert not overfull(tmp_path)
    (tmp_path / "more").write_bytes(bytes(DISK // 4))
    assert overfull(tmp_path)
    assert not overfull(tmp_path / "gone")


def test_a_chat_answer_ends_with_its_fence():
    assert build_predictions_instruct([["a\n```\nb", "c"]], [{"prompt": "p"}]) == [["pa\n", "pc"]]
