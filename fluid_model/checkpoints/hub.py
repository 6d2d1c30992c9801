"""Resolves a folder or a hub id to a local folder; hub models are downloaded into the hub's cache once."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import model_info, snapshot_download

from ..common.errors import ConfigError
from . import gguf_files
from .manifest import ADAPTER_FOLDER, MANIFEST_FILE, MASK_FILE
from .manifest import HEAD_FILE as OWN_HEAD_FILE
from .published_layouts import ADAPTER_FILE, HEAD_FILE, HEAD_FOLDER

MARKS = ("config.json", MANIFEST_FILE, ADAPTER_FILE)
"""A model's folder has at least one of these."""
DESCRIPTIONS = ("*.json", "*.jinja", "*.txt", "*.model", HEAD_FILE, f"{HEAD_FOLDER}/*{HEAD_FILE}", OWN_HEAD_FILE)
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
    """The local folder with a model's files.

    path: a folder, a GGUF file or the name of a packaged one (see `gguf_files`), a hub id (owner/name), or a GGUF file
    on the hub (owner/name/file.gguf).  weights: weights are needed, beside configuration and tokenizer.  code: so is
    the repository's code.  Raises ConfigError if the path is no model, or neither the hub nor its cache has it.
    """
    if len(path) > MAX_NAME or "\0" in path:
        raise ConfigError(f"model={path[:MAX_NAME]!r}: no name of a folder or of a hub's model")
    folder = Path(path).expanduser()
    gguf_file = gguf_files.gguf_of(path)
    if gguf_file is None and not (path and folder.is_dir()):
        repository, name = _hub_name(path)
        folder = _fetch(repository, name, weights, DESCRIPTIONS + CODE if code else DESCRIPTIONS)
        gguf_file = gguf_files.gguf_of(str(folder / name))
    if gguf_file is not None:
        return gguf_files.converted(gguf_file)
    if not any((folder / name).is_file() for name in MARKS):
        raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
    return folder


def _hub_name(path: str) -> tuple[str, str]:
    """A hub id, and the GGUF file named in it or "". Raises ConfigError for a path that is neither."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    is_path = Path(path).expanduser().exists() or owner in ("", ".", "..") or owner.startswith("~")
    if is_path or "/" in file or (file and not file.endswith(gguf_files.SUFFIX)):
        raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name, or owner/name/file.gguf)")
    return f"{owner}/{name}" if name else owner, file


def _fetch(repository: str, file: str, weights: bool, patterns: tuple[str, ...]) -> Path:
    """The repository's folder in the hub's cache.  file: a GGUF file to take, "" if none is named."""
    gguf: tuple[str, ...] = (file,) if file else ()
    # 1) is the hub there; a download has no timeout of its own
    try:
        info = model_info(repository, timeout=TIMEOUT)
        hub_error = None
    except Exception as error:  # the hub's clients raise many types; the cache serves instead
        info, hub_error = None, error
    # 2) a GGUF file, if that is all the repository holds
    if info is not None and not gguf:
        gguf = _only_gguf(repository, [sibling.rfilename for sibling in info.siblings or ()])
    # 3) descriptions, then weights
    folder = _snapshot(repository, patterns + gguf, hub_error)
    if weights and not gguf:
        folder = _snapshot(repository, patterns + WEIGHTS, hub_error)
        if not any(file.name != OWN_HEAD_FILE for file in folder.rglob("*.safetensors")):
            folder = _snapshot(repository, patterns + PICKLED, hub_error)
    return folder


def _only_gguf(repository: str, files: list[str]) -> tuple[str, ...]:
    """The GGUF file of a repository that holds no other form of a model. Raises ConfigError if there are several."""
    if any(name in files for name in MARKS):
        return ()
    ggufs = tuple(file for file in files if file.endswith(gguf_files.SUFFIX))
    if len(ggufs) > 1:
        raise ConfigError(f"model={repository}: {len(ggufs)} GGUF files; name one: {repository}/{ggufs[0]}")
    return ggufs


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
