"""The C library is compiled once; a compiler that is missing, fails or hangs costs seconds and one line."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from fluid_model.common import cache_folder
from fluid_model.forward import compiled
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.compiled import build, structs

from .test_llama import CONFIGS, model_of


@pytest.fixture(autouse=True)
def _no_library_yet(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has not tried to compile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    start_again(monkeypatch)


def start_again(monkeypatch):
    """As another process of the same user."""
    monkeypatch.setattr(build, "_attempt", functools.cache(build._attempt.__wrapped__))
    monkeypatch.setattr(build, "_failures", [])


def fake_compiler(tmp_path, monkeypatch, script):
    """`cc` on PATH, which counts its calls."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    file = folder / "cc"
    file.write_text(f"#!/bin/sh\necho >> {tmp_path}/calls\n{script}\n")
    file.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: len((tmp_path / "calls").read_text().splitlines())


def runs_in_torch(caplog):
    """Loads a model, and returns why it does not run compiled; each process warns in one line."""
    caplog.clear()
    backbone = Backbone(model_of(CONFIGS["llama"]))
    backbone.probe()
    assert compiled.rank(torch.ones(1, 9), 0, 2) is None
    assert [build.library(lanes) for lanes in build.LANES] == [None] * 3
    assert backbone.compiled is None
    (warning,) = [record.getMessage() for record in caplog.records]
    kind, reason = backbone.forward_choice
    assert kind == "explicit"
    assert warning == f"no compiled code, torch and Python run instead: {reason}"
    assert "\n" not in warning
    return reason


def test_without_a_compiler_torch_runs(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert runs_in_torch(caplog) == "no C compiler: no-such-compiler is not found"


def test_a_failure_is_remembered_by_all_processes(tmp_path, monkeypatch, caplog):
    script = "echo 'In file included from x:' >&2\necho 'x.h:1:2: error: no such thing' >&2\nexit 1"
    calls = fake_compiler(tmp_path, monkeypatch, script)
    assert runs_in_torch(caplog).endswith("cc failed: x.h:1:2: error: no such thing")
    made = calls()
    start_again(monkeypatch)
    reason = runs_in_torch(caplog)
    assert "error: no such thing (not tried again for an hour; remove" in reason
    assert calls() == made
    for note in cache_folder.folder().glob("*.failed"):
        os.utime(note, (0, time.time() - build.RETRY_AFTER - 1))
    start_again(monkeypatch)
    runs_in_torch(caplog)
    assert calls() == 2 * made, "an hour later it is tried again"


def lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_compiler_that_hangs_is_ended(tmp_path, monkeypatch, caplog):
    """With the processes it has started: here `sleep`, which holds the pipe."""
    monkeypatch.setattr(build, "TIMEOUT", 0.5)
    calls = fake_compiler(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/group\nsleep 600")
    started = time.monotonic()
    assert runs_in_torch(caplog).endswith("cc did not end within 0.5 s")
    assert time.monotonic() - started < 30
    made = calls()
    start_again(monkeypatch)
    runs_in_torch(caplog)
    assert calls() == made
    group = int((tmp_path / "group").read_text())
    while lives(group):  # until its parent has collected it
        time.sleep(0.05)
        assert time.monotonic() - started < 30


def test_a_compiler_that_does_not_start(tmp_path, monkeypatch, caplog):
    fake_compiler(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "cc").write_text("#!/no/such/shell\n")
    assert "cc does not start" in runs_in_torch(caplog)


def test_a_compiler_that_writes_nothing(tmp_path, monkeypatch, caplog):
    fake_compiler(tmp_path, monkeypatch, "exit 0")
    assert runs_in_torch(caplog).endswith("cc failed: status 0")


def test_it_can_be_turned_off(monkeypatch, caplog):
    monkeypatch.setenv(build.SWITCH, "0")
    assert Backbone(model_of(CONFIGS["llama"])).forward_choice == ("explicit", "FLUID_NATIVE=0")
    assert not caplog.records


def quick(monkeypatch):
    """Not optimised, which takes the compiler least time. Skips where there is none."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(build, "FLAGS", [flag for flag in build.FLAGS if flag != "-O3"])


@pytest.mark.slow
def test_it_is_compiled_once_whoever_asks(monkeypatch):
    """Three processes at the same time, and one later."""
    quick(monkeypatch)
    running = []
    for _ in range(3):
        running.append(os.fork())
        if running[-1] == 0:
            signal.alarm(60)
            os._exit(build.library(4) is None)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in running] == [0, 0, 0]
    (made,) = cache_folder.folder().iterdir()
    when = made.stat().st_mtime_ns
    assert build.library(4) is not None
    assert made.stat().st_mtime_ns == when


def test_sources_and_flags_name_the_library(tmp_path, monkeypatch):
    command = [shutil.which("sh"), "-O1"]
    keys = {build._key(command), build._key([*command, "-O2"])}
    copied = shutil.copytree(build.FOLDER, tmp_path / "csrc")
    monkeypatch.setattr(build, "FOLDER", copied)
    assert build._key(command) in keys
    for file in copied.iterdir():
        file.write_text(file.read_text() + "\n")
        keys.add(build._key(command))
    assert len(keys) == 2 + len(list(copied.iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [struct.__name__ for struct in structs.STRUCTS])
def test_structures_of_another_size_are_refused(name, monkeypatch, caplog):
    """On both sides: a field more in Python is a library of another layout."""
    quick(monkeypatch)
    assert build.library(4) is not None

    class Longer(getattr(structs, name)):
        _fields_ = (("more", ctypes.c_long),)

    Longer.__name__ = name
    monkeypatch.setattr(structs, "STRUCTS", (Longer,))
    start_again(monkeypatch)
    size = ctypes.sizeof(Longer)
    assert build.library(4) is None
    assert build.why_not(4) == f"{name} has {size - 8} bytes in C and {size} in Python"
    assert "no compiled code" in caplog.text


def test_the_sources_are_in_the_wheel(tmp_path):
    root = build.FOLDER.parents[3]
    if not (root / "pyproject.toml").exists():
        pytest.skip("no checkout to build a wheel of")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=root, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if "/csrc/" in name}
    assert packed == {file.relative_to(root).as_posix() for file in build.FOLDER.iterdir()}
