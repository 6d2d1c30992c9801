"""training.json: the provenance of a checkpoint, enough to train it again and to check the result.

{"recipe": {"stage": "fluid-hybrid", "out": "checkpoints/tiny-fluid", ...},    all settings, defaults included
 "recipe_hash": "3c7d5e3b2737",                    settings that differ from their defaults, without `out`
 "commit": "8d1f…+",                               of this code; "+" with uncommitted changes
 "data": [{"file": "train.jsonl", "sha256": "…", "bytes": 1048576}],
 "seed": 2,
 "parent_hash": "9f2c…",                           of the parent's weight files; null for a hub id or a new model
 "versions": {"torch": "…", "transformers": "…", "python": "…", ...},
 "hardware": "…", "devices": 1, "threads": 2,
 "seconds": 1234.5,                                wall time, interrupted attempts included
 "final": {"loss": 3.28, "l_ar": 3.23, "l_diff": 3.33, "accepted": 1.08, "drift": 0.21},     on held-out rows
 "before": [...],                                  the same of earlier stages
 "history": [{"loss": 3.6, "step": 10, ...}, {"eval_loss": 3.3, "step": 20, ...}],
 "steps": 2400}
"""

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
from .register import data_sources
from .rows import fingerprint

PACKAGES = ("fluid-eval", "torch", "transformers", "peft", "accelerate", "tokenizers")


def training_record(
    recipe: Recipe,
    final: dict[str, float],
    history: list[dict[str, Any]],
    seconds: float,
    before: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """training.json of a finished training, less `steps`.

    final: held-out figures, named eval_….  history: Trainer's log.  before: training.json of earlier stages.
    """
    parent = recipe.model.parent
    return {
        "recipe": as_table(recipe),
        "recipe_hash": recipe.hash,
        "commit": code_commit(),
        "data": [fingerprint(file) for source in data_sources(recipe.data) for file in source.files],
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
    """The commit of this code, with "+" if tracked files differ from it; None outside a git checkout.

    Bundled weights are not compared: training replaces them.
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
    """The processor's name, as far as the system reports it."""
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
