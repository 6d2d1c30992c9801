"""The bundled checkpoints, by name."""

from __future__ import annotations

from pathlib import Path

from fluid_model.common.errors import ConfigError
from fluid_model.common.names import did_you_mean

from .paths import resource


def bundled() -> dict[str, Path]:
    """Folders of the bundled checkpoints by name."""
    return {folder.name: folder for folder in sorted(resource("checkpoints").iterdir()) if folder.is_dir()}


def resolved(path: str) -> str:
    """A model's path, with the name of a bundled checkpoint as its folder. A folder in the working directory wins.

    Raises ConfigError for a name that is nearly one of theirs.
    """
    if Path(path).exists():
        return path
    names = bundled()
    if path not in names and "/" not in path and (meant := did_you_mean(path, names, alike=0.8)):
        raise ConfigError(f"model={path}: no such folder or bundled checkpoint; {meant}`fluid-eval models` lists them")
    return str(names.get(path, path))
