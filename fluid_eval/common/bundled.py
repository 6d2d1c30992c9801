"""The bundled checkpoints, by name."""

from __future__ import annotations

from pathlib import Path

from .paths import resource


def bundled() -> dict[str, Path]:
    """Folders of the bundled checkpoints by name."""
    return {folder.name: folder for folder in sorted(resource("checkpoints").iterdir()) if folder.is_dir()}


def resolved(path: str) -> str:
    """A model's path, with the name of a bundled checkpoint as its folder. A folder in the working directory wins."""
    return path if Path(path).exists() else str(bundled().get(path, path))
