"""Measured times of forwards, one curve a device and model, in the user's cache folder.

forward_times.json   {"tiny-fluid 61b9a688adeaefd9 on cpu, float32, 1, compiled":
                       {"points": [[1, 0.0002], [2, 0.0003], …], "attention": 1e-08}}

See `ForwardTime`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fluid_model.common import cache_folder, files
from fluid_model.forward.forward_time import ForwardTime

if TYPE_CHECKING:
    from fluid_model.forward.backbone import Backbone


def file() -> Path:
    """Path of the cache file. Raises OSError if no folder is writable by this user alone."""
    return cache_folder.folder() / "forward_times.json"


def known() -> dict[str, ForwardTime]:
    """Curves by model and device; none if the file is missing, damaged or another user's."""
    try:
        cached = cache_folder.cached_file(file().name)
        values = json.loads(cached.read_text(encoding="utf-8")) if cached else {}
        return {str(name): ForwardTime(**curve) for name, curve in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def recall(backbone: Backbone, device: str, model: str) -> ForwardTime:
    """The curve of this model on this device: cached, else measured now and cached if the folder is writable.

    device: every fact that its speed depends on.  model: name and hash of the weights.
    """
    name = f"{model} on {device}"
    curves = known()
    if name not in curves:
        curves[name] = backbone.forward_time
        _store(curves)
    return curves[name]


def _store(curves: Mapping[str, ForwardTime]) -> None:
    values = {name: {"points": curve.points, "attention": curve.attention} for name, curve in curves.items()}
    with suppress(OSError):  # measured again next time
        files.write(file(), json.dumps(values, indent=1))
