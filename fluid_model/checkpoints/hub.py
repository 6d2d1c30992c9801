"""Where a model's files lie: a folder, or the hub's cache, filled once. From here on a hub id is a folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import model_info, snapshot_download

from ..common.errors import ConfigError
from . import gguf_files
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

    path: a folder, a GGUF file or the name of a packaged one (see `gguf_files`), a hub id (owner/name), or a GGUF file
    on the hub (owner/name/file.gguf). Raises ConfigError if it cannot be a model or the hub does not give it.
    """
    if len(path) > MOST_NAME or "\0" in path:
        raise ConfigError(f"model={path[:MOST_NAME]!r}: no name of a folder or of a hub's model")
    folder = Path(path).expanduser()
    file = gguf_files.gguf_of(path)
    if file is None and not (path and folder.is_dir()):
        repository, name = _hub_name(path)
        folder = _fetch(repository, weights, SMALL + CODE if code else SMALL, name)
        file = gguf_files.gguf_of(str(folder / name))
    if file is not None:
        return gguf_files.converted(file)
    if not any((folder / name).is_file() for name in MARKS):
        raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
    return folder


def _hub_name(path: str) -> tuple[str, str]:
    """A hub id and the GGUF file in it, "" where none is named. Raises ConfigError if it cannot be one."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if Path(path).expanduser().exists() or owner in ("", ".", "..") or owner[0] == "~" or (file and "/" in file):
        raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name)")
    if file and not file.endswith(gguf_files.SUFFIX):
        raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name, or owner/name/file.gguf)")
    return f"{owner}/{name}" if name else owner, file


def _fetch(repository: str, weights: bool, small: tuple[str, ...], file: str) -> Path:
    named: tuple[str, ...] = (file,) if file else ()
    try:
        # a download itself would wait for a silent hub without end
        info = model_info(repository, timeout=TIMEOUT)
        silence = None
        named = named or _only_gguf(repository, [each.rfilename for each in info.siblings or ()])
    except ConfigError:
        raise
    except Exception as error:  # the hub's clients raise many types; all mean the same here: what the cache holds
        silence = error
    folder = _snapshot(repository, small + named, silence)
    if weights and not named:
        folder = _snapshot(repository, small + WEIGHTS, silence)
        if not any(file.name != OWN_HEAD_FILE for file in folder.rglob("*.safetensors")):
            folder = _snapshot(repository, small + PICKLED, silence)
    return folder


def _only_gguf(repository: str, files: list[str]) -> tuple[str, ...]:
    """The GGUF file of a repository that holds no other model. Raises ConfigError if there are several."""
    ggufs = () if any(name in files for name in MARKS) else tuple(f for f in files if f.endswith(gguf_files.SUFFIX))
    if len(ggufs) > 1:
        raise ConfigError(f"model={repository}: {len(ggufs)} GGUF files; name one: {repository}/{ggufs[0]}")
    return ggufs


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
