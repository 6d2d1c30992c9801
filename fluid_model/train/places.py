"""Where a training writes: its result, and beside it the steps saved on the way. Nothing else is replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoints.manifest import CHECKPOINT_FILES, TRAINING_FILE
from ..common import replace_folder
from ..common.errors import ConfigError
from .recipe import Recipe

RECIPE_FILE, CLOCK_FILE = "recipe_hash", "seconds"
WORK_FILES = (RECIPE_FILE, "checkpoint-*/*")
"""What a training leaves in its folder of steps; logs a tracker writes there are the user's."""


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """What training.json at `recipe.out` says if this very recipe made it."""
    manifest = _manifest(recipe)
    return manifest if manifest.get("recipe_hash") == recipe.hash else None


def check_out(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Raise ConfigError unless `recipe.out` is free, or this recipe's own result and to be overwritten."""
    out = Path(recipe.out)
    if replace_folder.is_free(out):
        return
    if finished(recipe) is None:
        other = _manifest(recipe).get("recipe_hash")
        what = f"the result of another recipe ({other}, this one is {recipe.hash})" if other else "something else"
        raise ConfigError(f"out={out} holds {what}; choose another out, or move it away")
    replace_folder.check_ours("out", out, CHECKPOINT_FILES)
    if not overwrite:
        raise ConfigError(f"out={out} holds this recipe's result; pass --overwrite to train it again")


def work_folder(recipe: Recipe, resume: bool) -> Path:
    """Where steps are saved: beside `out`. Another recipe's steps are not gone on with, saved ones not thrown away."""
    out = Path(recipe.out)
    work = out.with_name(f"{out.name}.training")
    mark = work / RECIPE_FILE
    if not replace_folder.is_free(work) and not mark.is_file():
        raise ConfigError(f"{work}, where steps are saved, holds something else; choose another out, or move it away")
    if resume and mark.is_file() and mark.read_text() != recipe.hash:
        raise ConfigError(f"{work} holds steps of another recipe ({mark.read_text()}, this one is {recipe.hash})")
    if not resume and (last := latest(work)) is not None:
        raise ConfigError(f"{work} holds saved steps ({last.name}): pass --resume to go on, or remove the folder")
    if is_first():
        if not resume:
            replace_folder.remove(work, WORK_FILES)  # a step that was not saved whole
        work.mkdir(parents=True, exist_ok=True)
        mark.write_text(recipe.hash)
    return work


def latest(work: Path) -> Path | None:
    """The last step that was saved whole: Trainer writes its state after all else."""
    whole = []
    for file in work.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            continue  # cut off in the middle
        whole.append(file.parent)
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def is_first() -> bool:
    """Whether this process is the one of a distributed training that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _manifest(recipe: Recipe) -> dict[str, Any]:
    try:
        values = json.loads((Path(recipe.out) / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
