"""Data sources: files, and data sets named in a register, LLaMA-Factory's dataset_info.json. No torch.

A register with an alpaca set and a sharegpt set; files lie beside it:

    {"mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "reply"}, "num_samples": 1000},
     "talk": {"file_name": "talk.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
              "tags": {"role_tag": "role", "content_tag": "text", "user_tag": "user", "assistant_tag": "bot"}}}

Entries are read as LLaMA-Factory reads them (hiyouga/LLaMA-Factory at ff6d4d12, src/llamafactory/data/parser.py): where
an entry names columns, all others are ignored. Unknown keys and unsupported ones are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ConfigError
from ..common.fields import build
from ..common.files import read_json
from .recipe import DataSpec

UNREADABLE = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
"""Suffixes of data files without a reader here."""


@dataclass(frozen=True)
class Columns:
    """Names of a row's fields, None for ignored ones. The defaults are those of a file without a register."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    system: str | None = "system"
    history: str | None = "history"
    messages: str | None = "conversations"
    tools: str | None = "tools"
    images: str | None = "images"
    videos: str | None = "videos"
    audios: str | None = "audios"
    chosen: str | None = "chosen"
    rejected: str | None = "rejected"
    kto_tag: str | None = "kto_tag"


NO_COLUMNS = dict.fromkeys(f.name for f in fields(Columns))
"""Columns of an entry before those that it names."""
FEEDBACK_COLUMNS = ("chosen", "rejected", "kto_tag")
"""Columns of preference data; no stage trains on it."""
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""Columns of an entry that names none."""


@dataclass(frozen=True)
class Tags:
    """Field names and role names inside the turns of a sharegpt set."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"
    observation_tag: str = "observation"
    function_tag: str = "function_call"


OPENAI_TAGS = Tags("role", "content", "user", "assistant", "system", "tool", "tool_calls")


@dataclass(frozen=True)
class DataSource:
    """A data file, or a folder of files of one kind, and the form of its rows.

    tags: of chat rows; None for alpaca rows.  registered: columns come from a register; otherwise each row's own fields
    identify its form.  num_samples: rows drawn at random; None for all.
    """

    file: Path
    columns: Columns = field(default_factory=Columns)
    tags: Tags | None = None
    registered: bool = False
    num_samples: int | None = None

    @property
    def files(self) -> list[Path]:
        """The file itself, or the folder's files sorted by name."""
        return sorted(self.file.iterdir()) if self.file.is_dir() else [self.file]


@dataclass(frozen=True)
class RegisterEntry:
    """An entry of dataset_info.json, with LLaMA-Factory's keys."""

    file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    num_samples: int | None = None
    columns: dict[str, Any] | None = None
    tags: dict[str, Any] | None = None
    hf_hub_url: str | None = None
    ms_hub_url: str | None = None
    om_hub_url: str | None = None
    script_url: str | None = None
    cloud_file_name: str | None = None
    file_sha1: str | None = None

    def __post_init__(self) -> None:
        for name in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"):
            if getattr(self, name) is not None:  # each takes precedence over file_name in LLaMA-Factory
                raise ConfigError(
                    f"{name} is not fetched here; save the set as a file and name that as file_name alone"
                )
        if self.file_name is None:
            raise ConfigError("has no file_name")
        if self.ranking:
            raise ConfigError("holds ranked pairs, which no stage here trains on")
        if self.split not in (None, "train"):
            raise ConfigError(
                f"split={self.split!r}: a file has no split but train; save the part as a file of its own"
            )
        for name in ("subset", "folder"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: a file has none; save the part as a file of its own"
                )
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples} must be at least 1")


def data_sources(data: DataSpec) -> list[DataSource]:
    """The files and data sets that a recipe names. Raises ConfigError naming a missing or an unsupported one."""
    sources = [DataSource(Path(name)) for name in data.files]
    for source in sources:
        if source.file.is_dir():
            raise ConfigError(f"data.files: {source.file} is a folder; name its files")
    if data.dataset_info is not None:
        sources += [_registered(Path(data.dataset_info), name) for name in data.datasets]
    for source in sources:
        _check_files(source)
    return sources


def _registered(register: Path, name: str) -> DataSource:
    """The data set of an entry. file_name is relative to the register's folder."""
    # 1) look the entry up
    entries = read_json(register)
    if name not in entries:
        raise ConfigError(f"data.datasets: {name!r} is not in {register}; known: {', '.join(entries)}")
    if not isinstance(entries[name], Mapping):
        raise ConfigError(f"{register}: {name}={entries[name]!r} must be a table")
    try:
        entry: RegisterEntry = build(RegisterEntry, entries[name])
        # 2) columns and tags, over the defaults of its formatting
        columns = _columns(entry)
        default = OPENAI_TAGS if entry.formatting == "openai" else Tags()
        named = {key: value for key, value in (entry.tags or {}).items() if value is not None}
        tags: Tags = build(Tags, {**vars(default), **named}, "tags.")
        # 3) the file
        file = register.parent / str(entry.file_name)
        if entry.file_sha1 and file.is_file() and hashlib.sha1(file.read_bytes()).hexdigest() != entry.file_sha1:
            raise ConfigError(f"file_sha1={entry.file_sha1} is not that of {file}")
    except ConfigError as error:
        raise ConfigError(f"{register}: {name}: {error}") from error
    chat_tags = None if entry.formatting == "alpaca" else tags
    return DataSource(file, columns, chat_tags, registered=True, num_samples=entry.num_samples)


def _columns(entry: RegisterEntry) -> Columns:
    """The columns of an entry. Raises ConfigError for names that do not fit together."""
    named = DEFAULT_COLUMNS if entry.columns is None else entry.columns
    columns: Columns = build(Columns, {**NO_COLUMNS, **named}, "columns.")
    for name in FEEDBACK_COLUMNS:
        if getattr(columns, name) is not None:
            raise ConfigError(f"columns.{name}: no stage here trains on feedback or ranked pairs")
    required = "prompt" if entry.formatting == "alpaca" else "messages"
    if getattr(columns, required) is None:
        raise ConfigError(f"columns.{required} is missing")
    if required == "prompt" and columns.response is None:  # a text to learn, which has no turns
        for name in ("system", "history"):
            if getattr(columns, name) is not None:
                raise ConfigError(f"columns.{name} needs columns.response beside it")
    return columns


def _check_files(source: DataSource) -> None:
    """Raise ConfigError unless the source has files, all of one readable kind."""
    if not source.file.exists():
        raise ConfigError(f"data: {source.file}: no such file")
    files = source.files
    if not files:
        raise ConfigError(f"data: {source.file}: an empty folder")
    kinds = sorted({"".join(file.suffixes[-2:]) for file in files}) if len(files) > 1 else []
    if len(kinds) > 1:
        raise ConfigError(f"data: {source.file} holds files of several kinds ({', '.join(kinds)}); one is wanted")
    for file in files:
        if file.is_dir():
            raise ConfigError(f"data: {file}: a folder where a file is wanted")
        if file.suffix in UNREADABLE:
            raise ConfigError(f"data: {file}: {file.suffix} is not read here; save it as JSON lines")
