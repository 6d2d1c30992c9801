"""Slot budgets measured so far, one a device and model, kept in the user's cache folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluid_model.common import cache_folder, files

if TYPE_CHECKING:
    from fluid_model.forward.backbone import Backbone


def file() -> Path:
    """Where they are kept. Raises OSError where there is no place that is the user's alone."""
    return cache_folder.folder() / "slot_budgets.json"


def known() -> dict[str, int]:
    """Budgets by device and model; none where the file is missing, damaged or another's."""
    try:
        held = cache_folder.cached_file(file().name)
        values = json.loads(held.read_text(encoding="utf-8")) if held else {}
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
    with suppress(OSError):  # then it is measured again next time
        files.write(file(), json.dumps(budgets, indent=1))
