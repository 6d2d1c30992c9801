"""Slot budgets measured so far, one a device and model, kept in the user's cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluid_model.backbone import Backbone


def file() -> Path:
    """Where they are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fluid-eval" / "slot_budgets.json"


def known() -> dict[str, int]:
    """Budgets by device and model; none where the file is missing or damaged."""
    try:
        values = json.loads(file().read_text(encoding="utf-8"))
        return {str(name): int(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def recall(backbone: Backbone, device: str, model: str) -> int:
    """The budget measured earlier for this device and model, or one measured now and kept if the folder can be written.

    device: all that makes it fast or slow.  model: what tells its weights from others.
    """
    name = f"{model} on {device}"
    budgets = known()
    if name not in budgets:
        budgets[name] = backbone.slot_budget
        _keep(budgets)
    return budgets[name]


def _keep(budgets: dict[str, int]) -> None:
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=file().parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(budgets, out, indent=1)
        os.replace(draft, file())
    except OSError:
        return  # it is measured again next time
