"""Measured slot budgets, one a device and model, in the user's cache folder.

slot_budgets.json   {"tiny-fluid 61b9a688adeaefd9 on cpu, float32, 1, compiled": 2}
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluid_model.common import cache_folder, files

if TYPE_CHECKING:
    from fluid_model.forward.backbone import Backbone


def file() -> Path:
    """Path of the cache file. Raises OSError if no folder is writable by this user alone."""
    return cache_folder.folder() / "slot_budgets.json"


def known() -> dict[str, int]:
    """Budgets by model and device; none if the file is missing, damaged or another user's."""
    try:
        cached = cache_folder.cached_file(file().name)
        values = json.loads(cached.read_text(encoding="utf-8")) if cached else {}
        return {str(name): int(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def recall(backbone: Backbone, device: str, model: str) -> int:
    """The budget of this model on this device: cached, else measured now and cached if the folder is writable.

    device: every fact that its speed depends on.  model: name and hash of the weights.
    """
    name = f"{model} on {device}"
    budgets = known()
    if name not in budgets:
        budgets[name] = backbone.slot_budget
        _store(budgets)
    return budgets[name]


def _store(budgets: dict[str, int]) -> None:
    with suppress(OSError):  # measured again next time
        files.write(file(), json.dumps(budgets, indent=1))
