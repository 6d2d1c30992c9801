"""What tests share. Real data and weights lie beside the checkout; tests that need them skip where they are absent."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # small models: threads only wait for one another
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.pop("FLUID_DATA_DIR", None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have their parent's: what one compiles is there for all
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # slot budgets measured here are nobody else's

HASTE = HealthCheck.too_slow
"""A busy machine is no fault of a test."""
settings.register_profile("suite", derandomize=True, deadline=None, database=None, suppress_health_check=[HASTE])
settings.register_profile("random", settings.get_profile("suite"), derandomize=False, print_blob=True)
settings.load_profile("suite")  # the same inputs every time; nox -s properties draws others

gc.disable()
"""Until all files are imported: libraries make a million objects, and none of them is garbage."""
LONGEST = (
    *("run", "train", "sweep", "parity", "laws", "graphs", "plan", "rounds", "chat", "hostile", "compiled", "report"),
    *("audit", "gated", "samplers", "warden", "gpu_bench", "places", "methods", "sandbox", "layout"),
)
"""Files that take longest begin first, so that no worker is left alone with one at the end (--no-loadscope-reorder)."""
SHARED = Path(__file__).resolve().parents[2] / "shared"
FEW = 12
"""Rows of a subject in `few_rows`: more than any test answers, and enough to draw five examples from."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. Tests marked gpu are skipped, with the reason, where torch sees no CUDA device."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


def pytest_collection_finish() -> None:
    set_aside_objects()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        set_aside_objects()  # of libraries that this file's tests were the first to import


def set_aside_objects() -> None:
    """What lives now lives to the end, nearly all of it: no later collection walks it again.

    Trainer collects garbage at each training, Python itself every so often. Walking a million objects takes 0.5 s.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which tiers of isolation programs were judged in and which not, with the reason: what is skipped has not passed.

    The suite judges in the strongest that holds here; the attacks of nox -s security name their tier in brackets.
    """
    reports = [r for outcome in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(outcome, [])]
    judging = [
        r for r in reports if r.nodeid.startswith(("tests/test_security", "tests/test_sandbox", "tests/test_ward"))
    ]
    if not judging:
        return
    from fluid_eval.sandbox.ladder import failure_of, strongest_tier
    from fluid_eval.sandbox.tiers import LADDER

    terminalreporter.section("isolation", sep="-")
    for tier in LADDER:
        attacks = [r for r in judging if f"[{tier.name}-" in r.nodeid]
        done = sum(r.when == "call" and r.outcome != "skipped" for r in attacks)
        if why := failure_of(tier):
            status = f"NOT TRIED ({len(attacks)} attacks skipped): {why}; to have it: {tier.needs}"
        elif done or tier.name == strongest_tier().name:
            status = f"holds; tried with {done} attacks" if done else "holds; this suite's programs were judged in it"
        else:
            status = "holds; NOT TRIED here: nox -s security attacks it"
        terminalreporter.write_line(f"{tier.name:10} {status}")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in a folder named shared beside the checkout")
    return folder


@pytest.fixture(scope="session")
def c_library() -> None:
    """Compiled when the first test needs it: not by every worker, all at once, while they collect."""
    from fluid_model.forward import compiled

    if compiled.library(4) is None:
        pytest.skip("no C compiler")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return _shared("data")


@pytest.fixture(scope="session")
def few_rows(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of each benchmark, of every subject, as a data folder: lm-eval goes through all it is given."""
    from fluid_model.common.files import read_lines

    folder = tmp_path_factory.mktemp("few")
    for name in ("gsm8k", "math500", "humaneval", "mmlu"):
        (folder / name).mkdir()
        for file in (data_dir / name).glob("*.jsonl*"):
            few, seen = [], Counter[str]()
            for _, line in read_lines(file):
                seen[subject := json.loads(line).get("subject", "")] += 1
                few += [line] * (seen[subject] <= FEW)
            (folder / name / f"{file.name.partition('.')[0]}.jsonl").write_text("".join(few), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def stories() -> Path:
    return _shared("models/stories260K")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers that spells bytes, as a folder."""
    from .tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_fluid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUID checkpoint, as a folder."""
    import fluid_model

    from .tiny import fluid_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "fluid"
    fluid_model.save(fluid_checkpoint(tau=(2.8, 1.0)), folder)
    return folder
