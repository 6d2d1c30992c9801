"""Resolves a folder or a hub id to a local folder; hub models are downloaded into the hub's cache once."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import model_info, snapshot_download

from ..common.errors import ConfigError
from .manifest import ADAPTER_FOLDER, MANIFEST_FILE, MASK_FILE
from .manifest import HEAD_FILE as OWN_HEAD_FILE
from .published_layouts import ADAPTER_FILE, HEAD_FILE

MARKS = ("config.json", MANIFEST_FILE, ADAPTER_FILE)
"""A model's folder has at least one of these."""
DESCRIPTIONS = ("*.json", "*.jinja", "*.txt", "*.model", HEAD_FILE, OWN_HEAD_FILE)
"""Configuration, tokenizer, K-heads."""
CODE = ("*.py",)
WEIGHTS = ("model*.safetensors", "adapter_model*", f"{ADAPTER_FOLDER}/*", MASK_FILE)
PICKLED = ("pytorch_model*.bin",)
"""Downloaded only where no safetensors are published."""
MAX_NAME = 1024
"""Limit on the characters of a folder's name or a hub id."""
TIMEOUT = 8.0
"""Seconds to wait for the hub's first answer before using its cache alone."""


def local_folder(path: str, *, weights: bool, code: bool = False) -> Path:
    """The local folder with a model's files. path: a folder, or a hub id (owner/name).

    weights: weights are needed, beside configuration and tokenizer.  code: so is the repository's code.
    Raises ConfigError if the path is no model, or neither the hub nor its cache has it.
    """
    if len(path) > MAX_NAME or "\0" in path:
        raise ConfigError(f"model={path[:MAX_NAME]!r}: no name of a folder or of a hub's model")
    folder = Path(path).expanduser()
    if not (path and folder.is_dir()):
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
            raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name)")
        folder = _fetch(path, weights, DESCRIPTIONS + CODE if code else DESCRIPTIONS)
    if not any((folder / name).is_file() for name in MARKS):
        raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
    return folder


def _fetch(repository: str, weights: bool, patterns: tuple[str, ...]) -> Path:
    try:
        model_info(repository, timeout=TIMEOUT)  # a download has no timeout of its own
        hub_error = None
    except Exception as error:  # the hub's clients raise many types; the cache serves instead
        hub_error = error
    folder = _snapshot(repository, patterns, hub_error)
    if weights:
        folder = _snapshot(repository, patterns + WEIGHTS, hub_error)
        if not any(file.name != OWN_HEAD_FILE for file in folder.rglob("*.safetensors")):
            folder = _snapshot(repository, patterns + PICKLED, hub_error)
    return folder


def _snapshot(repository: str, patterns: tuple[str, ...], hub_error: Exception | None) -> Path:
    """The repository's files whose names match, in the hub's cache.  hub_error: why the hub is not asked."""
    try:
        files = snapshot_download(repository, allow_patterns=list(patterns), local_files_only=hub_error is not None)
    except Exception as error:
        raise ConfigError(
            f"model={repository}: the hub gave {type(hub_error or error).__name__} and its cache holds no such model; "
            "connect to it, or pass a folder"
        ) from error
    return Path(files)
