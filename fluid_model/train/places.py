"""Output folders of a training. No other file is replaced or removed.

OUT/                        the result, a checkpoint (`checkpoints.manifest`)
OUT.training/recipe_hash    whose steps these are
OUT.training/checkpoint-N/  Trainer's saved step N, with its wall time in `seconds`
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoints.manifest import CHECKPOINT_FILES, TRAINING_FILE
from ..common import replace_folder
from ..common.errors import ConfigError
from .recipe import Recipe

RECIPE_FILE, SECONDS_FILE = "recipe_hash", "seconds"
WORK_FILES = (RECIPE_FILE, "checkpoint-*/*")
"""Files of a training in its folder of saved steps. A tracker's logs there belong to the user."""


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """training.json at `recipe.out`, None unless it is this recipe's own."""
    record = _read_record(recipe)
    return record if record.get("recipe_hash") == recipe.hash else None


def check_out(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Raise ConfigError unless `recipe.out` is free, or holds this recipe's own result and `overwrite` is set."""
    out = Path(recipe.out)
    if replace_folder.is_free(out):
        return
    if finished(recipe) is None:
        other = _read_record(recipe).get("recipe_hash")
        content = f"the result of another recipe ({other}, this one is {recipe.hash})" if other else "something else"
        raise ConfigError(f"out={out} holds {content}; choose another out, or move it away")
    replace_folder.check_ours("out", out, CHECKPOINT_FILES)
    if not overwrite:
        raise ConfigError(f"out={out} holds this recipe's result; pass --overwrite to train it again")


def work_folder(recipe: Recipe, resume: bool) -> Path:
    """The folder of saved steps, beside `out`; created by the first process.

    Raises ConfigError if it holds other files, steps of another recipe, or steps without `resume`.
    """
    # 1) check whose files are there
    out = Path(recipe.out)
    work = out.with_name(f"{out.name}.training")
    owner = work / RECIPE_FILE
    if not replace_folder.is_free(work) and not owner.is_file():
        raise ConfigError(f"{work}, where steps are saved, holds something else; choose another out, or move it away")
    if resume and owner.is_file() and owner.read_text() != recipe.hash:
        raise ConfigError(f"{work} holds steps of another recipe ({owner.read_text()}, this one is {recipe.hash})")
    if not resume and (last := latest_step(work)) is not None:
        raise ConfigError(f"{work} holds saved steps ({last.name}): pass --resume to go on, or remove the folder")
    # 2) create it
    if is_first():
        if not resume:
            replace_folder.remove(work, WORK_FILES)  # an incomplete step
        work.mkdir(parents=True, exist_ok=True)
        owner.write_text(recipe.hash)
    return work


def latest_step(work: Path) -> Path | None:
    """Folder of the last complete step, None without any. Trainer writes trainer_state.json last."""
    complete = []
    for file in work.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(file.read_text())
        except ValueError:
            continue  # truncated
        complete.append(file.parent)
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def is_first() -> bool:
    """Whether this is the process of a distributed training that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def _read_record(recipe: Recipe) -> dict[str, Any]:
    """training.json at `recipe.out`; empty if it is missing or unreadable."""
    try:
        values = json.loads((Path(recipe.out) / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
