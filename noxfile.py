"""Sessions run in the environment nox itself is installed in (pip install -c constraints.txt -e '.[dev]').

Only `wheel` makes one of its own: it installs the built wheel elsewhere and runs the main job from it.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "slow",
    "browser",
    "security",
    "chain",
    "sweep_smoke",
    "tour",
    "docs",
    "wheel",
]
nox.options.default_venv_backend = "none"
HERE = Path(__file__).resolve().parent


def python(session: nox.Session, *words: str) -> None:
    session.run(sys.executable, "-m", *words)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    python(session, "ruff", "check", ".")
    python(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of both packages, strictly."""
    python(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, two files at a time; words after -- go to pytest."""
    python(session, "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take seconds each: whole pages of documentation, other programs beside ours, measurements."""
    python(session, "pytest", "-m", "slow", "-n", "2", *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Reports and the viewer in Chromium."""
    python(session, "pytest", "-m", "browser", "-rs", "tests/test_report_browser.py", "tests/test_view_browser.py")


@nox.session
def properties(session: nox.Session) -> None:
    """Property tests on inputs drawn anew, in several rounds: -- [--seed N] [--rounds N] [words for pytest].

    Prints each round's seed; `-- --seed N --rounds 1` draws the same again.
    """
    parser = argparse.ArgumentParser(prog="nox -s properties --")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--rounds", type=int, default=10)
    asked, words = parser.parse_known_args(session.posargs)
    for seed in range(asked.seed, asked.seed + asked.rounds):
        session.log(f"seed {seed}")
        drawn = ["--hypothesis-profile", "random", "--hypothesis-seed", str(seed)]
        python(session, "pytest", "-m", "hypothesis", "-n", "2", "--dist", "loadfile", *drawn, *words)


@nox.session
def reproduce_table(session: nox.Session) -> None:
    """Every claim of reports/claims.toml beside what this machine measures anew: tables, verdicts, clashes, a report.

    Words after -- go to the command: --table tiny, --models-dir DIR, --docs docs/claims.md, --resume.
    """
    python(session, "fluid_eval", "reproduce", *session.posargs)


@nox.session
def reproduce_checkpoint(session: nox.Session) -> None:
    """Train a bundled checkpoint again from its recipe and compare: -- tiny-fluid [--short]."""
    python(session, "bench.reproduce", *session.posargs)


@nox.session
def chain(session: nox.Session) -> None:
    """The claim chain in small, from nothing: train AR, adapt, calibrate, decode. Then a parent from elsewhere."""
    python(session, "bench.reproduce", "tiny-fluid", "--short", "--build", str(Path(session.create_tmp()).resolve()))
    python(session, "pytest", "-m", "chain")


@nox.session
def sweep_smoke(session: nox.Session) -> None:
    """Some points of the documented sweep on few questions, on Ray workers, resumed; what else starts Ray; kills."""
    out = Path(session.create_tmp()).resolve() / "sweep"
    session.env.pop("TMPDIR", None)  # Ray's sockets lie below it, and their paths have at most 107 characters
    words = ["sweep", "bench/tiny-sweep.toml", "--limit", "2", "--sample", "6", "--engine", "ray", "--workers", "2"]
    python(session, "fluid_eval", *words, "--out", str(out), "--resume")
    python(session, "fluid_eval", *words, "--out", str(out), "--resume", "--json")
    assert (out / "frontier-tokens_per_second.png").stat().st_size > 10_000
    python(session, "pytest", "-m", "cluster")
    python(session, "bench.faults", "--quick")


@nox.session
def security(session: nox.Session) -> None:
    """Programs that attack, on every isolation tier that holds here; none may get through. Jails that are killed."""
    python(session, "pytest", "-m", "security", "-rs", "tests/test_security.py", "tests/test_warden.py")


@nox.session
def tour(session: nox.Session) -> None:
    """Every documented first-day task on the tiny family."""
    where = str(Path(session.create_tmp()).resolve())
    session.run("bash", str(HERE / "docs" / "tour.sh"), where, external=True, env={"PYTHON": sys.executable})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site in build/docs; a link that leads nowhere, or a page without a place, fails."""
    python(session, "mkdocs", "build", "--strict", "--quiet")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it in a fresh environment, run HumanEval's main job and the bundled default."""
    work = Path(session.create_tmp()).resolve()
    shutil.rmtree(work)  # an earlier session's runs would be found finished
    work.mkdir()
    python(session, "build", "--wheel", "--no-isolation", "--outdir", str(work / "dist"))
    session.run(sys.executable, "-m", "venv", "--clear", str(work / "venv"))
    (built,) = sorted((work / "dist").glob("*.whl"))[-1:]
    bin_ = work / "venv" / "bin"
    session.run(str(bin_ / "pip"), "install", "-q", "-c", str(HERE / "constraints.txt"), str(built), external=True)
    python(session, "tests.tiny", str(work / "model"))
    with session.chdir(work):
        output = session.run(
            str(bin_ / "fluid-eval"), "run", "--tasks", "humaneval", "--model", "model", "--limit", "2",
            "--max-new-tokens", "8", "--allow-unsafe-code", "--out", "run", "--resume", "--json",
            external=True, silent=True, success_codes=[0, 3],  # random weights fill every answer's 8 tokens
        )  # fmt: skip
        session.run(str(bin_ / "fluid-eval"), "report", "run", external=True)
        session.run(str(bin_ / "fluid-eval"), "run", "--limit", "1", "--out", "default", external=True)
    assert json.loads(str(output)[str(output).index("{") :])["lines"][0]["n"] == 2, "the wheel's main job ran"
    assert (work / "run" / "report.html").stat().st_size > 10_000
