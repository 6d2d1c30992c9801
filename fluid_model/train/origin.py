"""training.json: how a checkpoint was made, enough to do it again and to see that it came out the same."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .recipe import Recipe, as_table
from .register import sources
from .rows import fingerprint

PACKAGES = ("fluid-eval", "torch", "transformers", "peft", "accelerate", "tokenizers")


def told(
    recipe: Recipe,
    final: dict[str, float],
    history: list[dict[str, Any]],
    seconds: float,
    before: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The manifest of a finished training. before: those of the stages its recipe file asked for earlier."""
    parent = recipe.model.parent
    return {
        "recipe": as_table(recipe),
        "recipe_hash": recipe.hash,
        "commit": code_commit(),
        "data": [fingerprint(file) for source in sources(recipe.data) for file in source.files],
        "seed": recipe.seed,
        "parent_hash": weights_hash(Path(parent)) if parent is not None and Path(parent).is_dir() else None,
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "devices": max(1, torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", "1"))),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "final": {name.removeprefix("eval_"): value for name, value in final.items() if _is_metric(name)},
        "before": list(before),
        "history": [entry for entry in history if any(key in entry for key in ("loss", "eval_loss", "eval_accepted"))],
    }


def code_commit() -> str | None:
    """The commit this code stands at, "+" if files differ from it, None outside a git checkout.

    Bundled weights may differ: a training replaces them.
    """
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!checkpoints")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def weights_hash(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint's weight, adapter and manifest files."""
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.safetensors"), *folder.glob("fluid.json"), *folder.glob("*.bin")]):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def cpu_name() -> str:
    """The processor's name, as far as this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
