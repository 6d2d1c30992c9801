"""Compiles the C sources once, and keeps the shared library in the user's cache folder.

The library's name is a hash of all that it depends on: sources, flags, compiler, processor. A library of that name is
loaded; otherwise the compiler runs, for TIMEOUT seconds at most. Where it fails, torch runs instead, and a note beside
the libraries keeps other processes from trying again for RETRY_AFTER seconds:

    ~/.cache/fluid-eval/compiled-c584acbda63e4321.so       loaded
    ~/.cache/fluid-eval/compiled-eb115183daa651b6.failed   cc failed: vectors.h:13:10: fatal error: math.h: No such file
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from ...common import cache_folder, files
from . import structs

FOLDER = Path(__file__).parent / "csrc"
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread",
)  # fmt: skip
"""`-ffp-contract=fast` fuses a product and the sum it goes into, which takes one instruction and one rounding for two.
It is gcc's default but not clang's. What is fused is decided by the compiler once, so it is the same in every batch.
"""
TIMEOUT = 120.0
"""Seconds that the compiler may take. It needs 4 to 9 of its own."""
RETRY_AFTER = 3600.0
"""Seconds for which a failed compilation is remembered by all processes of the user."""
LANES = (16, 8, 4)
"""Floats in a vector register, the most first; sizes of a model must be multiples."""
LANES_OF = {"AVX512": 16, "AVX2": 8}
"""By torch's name of the processor's instruction set; others are taken to have the least."""
SWITCH = "FLUID_NATIVE"
"""Environment variable; 0 turns compiled code off."""

_log = logging.getLogger(__name__)
_failures: list[str] = []
"""Why this process has no library; empty if it has not failed."""


class BuildError(Exception):
    """There is no library. The message says why, in one line."""


def library(lanes: int) -> ctypes.CDLL | None:
    """Compiled code for vectors of so many floats; None where there is none, see `why_not`."""
    return _attempt(lanes)[0]


def why_not(lanes: int) -> str:
    """Why there is no compiled code, in one line; empty where there is."""
    return _attempt(lanes)[1]


@functools.cache
def native_lanes() -> int:
    """Floats in a vector register of this processor."""
    return LANES_OF.get(torch.backends.cpu.get_cpu_capability(), LANES[-1])


@functools.cache
def _attempt(lanes: int) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. Fails and warns once a process, in one line."""
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0"
    if _failures:  # with other lanes, and would again
        return None, _failures[0]
    try:
        return _load(lanes), ""
    except (BuildError, structs.LayoutError, OSError) as error:
        _failures.append(str(error))
        _log.warning("no compiled code, torch and Python run instead: %s", error)
        return None, str(error)


def _load(lanes: int) -> ctypes.CDLL:
    """The library from the cache folder, compiled if it is not there; where that folder cannot be trusted, compiled
    for this process alone. Raises BuildError, structs.LayoutError, or OSError if the library does not load.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise BuildError(f"no C compiler: {os.environ.get('CC', 'cc')} is not found")
    command = [compiler, *FLAGS, f"-DLANES={lanes}"]
    name = f"compiled-{_key(command)}"
    try:
        code = ctypes.CDLL(str(_cached(name, command)))
    except OSError as error:
        _log.warning("%s; compiled for this process alone", error)
        with tempfile.TemporaryDirectory() as scratch:
            code = ctypes.CDLL(str(_compile(Path(scratch, f"{name}.so"), command)))
    return structs.bind(code)


def _key(command: list[str]) -> str:
    """A hash of all that the library depends on."""
    sources = [f"{file.name}\n{file.read_text('utf-8')}" for file in sorted(FOLDER.glob("*.[ch]"))]
    compiler = os.stat(command[0])  # an upgrade is another compiler
    parts = [*sources, *command, f"{compiler.st_size} {compiler.st_mtime_ns}", _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What this processor can do: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _cached(name: str, command: list[str]) -> Path:
    """The library of that name in the cache folder. Raises BuildError, or OSError where the folder cannot be used."""
    if (file := cache_folder.cached_file(f"{name}.so")) is not None:
        return file
    folder = cache_folder.folder()
    failed = folder / f"{name}.failed"
    _check_earlier_failure(failed)
    file = folder / f"{name}.so"
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(Path(scratch, file.name), command).replace(file)  # atomic: other processes may compile it too
    except BuildError as error:
        with suppress(OSError):  # then other processes try, too
            files.write(failed, str(error))
        raise
    failed.unlink(missing_ok=True)
    return file


def _check_earlier_failure(failed: Path) -> None:
    """Raise BuildError if the same command failed a short while ago, in this process or another."""
    if cache_folder.cached_file(failed.name) is None:
        return
    if 0 <= time.time() - failed.stat().st_mtime < RETRY_AFTER:
        reason = failed.read_text("utf-8").splitlines() or ["it failed"]
        raise BuildError(f"{reason[0]} (not tried again for an hour; remove {failed} to try now)")


def _compile(file: Path, command: list[str]) -> Path:
    """Run the compiler. Raises BuildError if it fails or does not end in time."""
    words = [*command, "-o", str(file), *map(str, sorted(FOLDER.glob("*.c"))), "-lm"]
    try:
        # A session of its own, so that the processes of the compiler driver can be ended with it.
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error.strerror}") from None
    with process:
        try:
            _, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} did not end within {TIMEOUT:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0 or not file.exists():
        raise BuildError(f"{command[0]} failed: {_first_error(errors) or f'status {process.returncode}'}")
    return file


def _first_error(errors: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "")
