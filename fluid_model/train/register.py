"""Where training rows come from: files, and sets named by a LLaMA-Factory register (dataset_info.json). No torch.

A register's entry means what LLaMA-Factory's reader makes of it (hiyouga/LLaMA-Factory at ff6d4d12,
src/llamafactory/data/parser.py): where an entry names columns, a column it does not name is not read. A key that cannot
be honoured is refused, and so is one that is unknown.
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

FOREIGN_KINDS = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
"""Files of rows that are not read here."""


@dataclass(frozen=True)
class Columns:
    """Names of a row's fields, None for what is not read. As by default: what a file without a register may hold."""

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


UNNAMED = dict.fromkeys(f.name for f in fields(Columns))
"""No column at all: what an entry starts from that names some."""
PREFERENCE = ("chosen", "rejected", "kto_tag")
"""Columns of feedback, which no stage here trains on."""
USUAL = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
"""What an entry reads that names no columns."""


@dataclass(frozen=True)
class Tags:
    """Names inside the turns of a sharegpt set."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"
    observation_tag: str = "observation"
    function_tag: str = "function_call"


OPENAI = Tags("role", "content", "user", "assistant", "system", "tool", "tool_calls")


@dataclass(frozen=True)
class Source:
    """A file of rows, or a folder of files of one kind, and how a row is read.

    tags: its rows are chats with these names.  registered: a register says the columns; without one each row's own
    fields tell its form.  num_samples: rows drawn from it at random.
    """

    file: Path
    columns: Columns = field(default_factory=Columns)
    tags: Tags | None = None
    registered: bool = False
    num_samples: int | None = None

    @property
    def files(self) -> list[Path]:
        """The file itself, or those in the folder in the order of their names."""
        return sorted(self.file.iterdir()) if self.file.is_dir() else [self.file]


@dataclass(frozen=True)
class Entry:
    """A register's entry with LLaMA-Factory's keys."""

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
            if getattr(self, name) is not None:  # LLaMA-Factory prefers each of them to file_name
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


def sources(data: DataSpec) -> list[Source]:
    """The files and sets a recipe names. Raises ConfigError naming what is missing or cannot be honoured."""
    found = [Source(Path(name)) for name in data.files]
    for source in found:
        if source.file.is_dir():
            raise ConfigError(f"data.files: {source.file} is a folder; name its files")
    if data.dataset_info is not None:
        found += [_registered(Path(data.dataset_info), name) for name in data.datasets]
    for source in found:
        _check_files(source)
    return found


def _registered(info: Path, name: str) -> Source:
    """An entry of a register; its file_name counts from the register's own folder."""
    entries = read_json(info)
    if name not in entries:
        raise ConfigError(f"data.datasets: {name!r} is not in {info}; known: {', '.join(entries)}")
    if not isinstance(entries[name], Mapping):
        raise ConfigError(f"{info}: {name}={entries[name]!r} must be a table")
    try:
        entry: Entry = build(Entry, entries[name])
        columns = _columns(entry)
        default = OPENAI if entry.formatting == "openai" else Tags()
        named = {key: value for key, value in (entry.tags or {}).items() if value is not None}
        tags: Tags = build(Tags, {**vars(default), **named}, "tags.")
        file = info.parent / str(entry.file_name)
        if entry.file_sha1 and file.is_file() and hashlib.sha1(file.read_bytes()).hexdigest() != entry.file_sha1:
            raise ConfigError(f"file_sha1={entry.file_sha1} is not that of {file}")
    except ConfigError as error:
        raise ConfigError(f"{info}: {name}: {error}") from error
    return Source(file, columns, None if entry.formatting == "alpaca" else tags, True, entry.num_samples)


def _columns(entry: Entry) -> Columns:
    """The columns an entry reads. Raises ConfigError for names that do not fit."""
    named = USUAL if entry.columns is None else entry.columns
    columns: Columns = build(Columns, {**UNNAMED, **named}, "columns.")
    if preference := [name for name in PREFERENCE if getattr(columns, name) is not None]:
        raise ConfigError(f"columns.{preference[0]}: no stage here trains on feedback or ranked pairs")
    wanted = "prompt" if entry.formatting == "alpaca" else "messages"
    if getattr(columns, wanted) is None:
        raise ConfigError(f"columns.{wanted} is missing")
    lone = [name for name in ("system", "history") if getattr(columns, name) is not None]
    if wanted == "prompt" and columns.response is None and lone:
        raise ConfigError(f"columns.{lone[0]} needs columns.response beside it")
    return columns


def _check_files(source: Source) -> None:
    """There is something to read, and all of it of one kind."""
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
        if file.suffix in FOREIGN_KINDS:
            raise ConfigError(f"data: {file}: {file.suffix} is not read here; save it as JSON lines")
