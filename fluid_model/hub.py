"""Where a model's files lie: a folder, or the hub's cache, filled once. From here on a hub id is a folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import ConfigError
from .legacy import ADAPTER_FILE, HEAD_FILE
from .manifest import ADAPTER_FOLDER, MANIFEST_FILE, MASK_FILE
from .manifest import HEAD_FILE as OWN_HEAD_FILE

MARKS = ("config.json", MANIFEST_FILE, ADAPTER_FILE)
"""A folder without any of these is no model."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", HEAD_FILE, OWN_HEAD_FILE)
"""Files that describe a model."""
WEIGHTS = ("model*.safetensors", "adapter_model*", f"{ADAPTER_FOLDER}/*", MASK_FILE)
PICKLED = ("pytorch_model*.bin",)
"""Fetched only where there is no other."""


def local(path: str, *, weights: bool) -> Path:
    """The folder with a model's files.  weights: whether they are wanted too, or only what describes them.

    path: a folder, or a hub id (owner/name). Raises ConfigError if it cannot be a model or the hub does not give it.
    """
    folder = Path(path).expanduser()
    if not (path and folder.is_dir()):
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
            raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name)")
        folder = _fetch(path, weights)
    if not any((folder / name).is_file() for name in MARKS):
        raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
    return folder


def _fetch(repository: str, weights: bool) -> Path:
    folder = _snapshot(repository, SMALL)
    if weights:
        folder = _snapshot(repository, SMALL + WEIGHTS)
        if not any(file.name != OWN_HEAD_FILE for file in folder.rglob("*.safetensors")):
            folder = _snapshot(repository, SMALL + PICKLED)
    return folder


def _snapshot(repository: str, patterns: tuple[str, ...]) -> Path:
    """The repository's files whose names match, in the hub's cache; without a hub, what the cache holds."""
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's clients raise many types; all mean the same here
        raise ConfigError(
            f"model={repository}: the hub gave {type(error).__name__}; connect to it, or pass a folder with the files"
        ) from error
