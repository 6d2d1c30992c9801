"""Where a model's files lie: a folder, or the hub's cache, filled once. From here on a hub id is a folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import model_info, snapshot_download

from ..common.errors import ConfigError
from .manifest import ADAPTER_FOLDER, MANIFEST_FILE, MASK_FILE
from .manifest import HEAD_FILE as OWN_HEAD_FILE
from .published_layouts import ADAPTER_FILE, HEAD_FILE

MARKS = ("config.json", MANIFEST_FILE, ADAPTER_FILE)
"""A folder without any of these is no model."""
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", HEAD_FILE, OWN_HEAD_FILE)
"""Files that describe a model."""
CODE = ("*.py",)
WEIGHTS = ("model*.safetensors", "adapter_model*", f"{ADAPTER_FOLDER}/*", MASK_FILE)
PICKLED = ("pytorch_model*.bin",)
"""Fetched only where there is no other."""
MOST_NAME = 1024
"""Characters of a folder's name or a hub id."""
TIMEOUT = 8.0
"""Seconds to wait for the hub's first answer before using its cache alone."""


def local(path: str, *, weights: bool, code: bool = False) -> Path:
    """The folder with a model's files.  weights: whether they are wanted too, or only what describes them.  code:
    likewise the repository's own.

    path: a folder, or a hub id (owner/name). Raises ConfigError if it cannot be a model or the hub does not give it.
    """
    if len(path) > MOST_NAME or "\0" in path:
        raise ConfigError(f"model={path[:MOST_NAME]!r}: no name of a folder or of a hub's model")
    folder = Path(path).expanduser()
    if not (path and folder.is_dir()):
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
            raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name)")
        folder = _fetch(path, weights, SMALL + CODE if code else SMALL)
    if not any((folder / name).is_file() for name in MARKS):
        raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
    return folder


def _fetch(repository: str, weights: bool, small: tuple[str, ...]) -> Path:
    try:
        model_info(repository, timeout=TIMEOUT)  # a download itself would wait for a silent hub without end
        silence = None
    except Exception as error:  # the hub's clients raise many types; all mean the same here: what the cache holds
        silence = error
    folder = _snapshot(repository, small, silence)
    if weights:
        folder = _snapshot(repository, small + WEIGHTS, silence)
        if not any(file.name != OWN_HEAD_FILE for file in folder.rglob("*.safetensors")):
            folder = _snapshot(repository, small + PICKLED, silence)
    return folder


def _snapshot(repository: str, patterns: tuple[str, ...], silence: Exception | None) -> Path:
    """The repository's files whose names match, in the hub's cache.  silence: why the hub cannot be asked."""
    try:
        files = snapshot_download(repository, allow_patterns=list(patterns), local_files_only=silence is not None)
    except Exception as error:
        raise ConfigError(
            f"model={repository}: the hub gave {type(silence or error).__name__} and its cache holds no such model; "
            "connect to it, or pass a folder"
        ) from error
    return Path(files)
