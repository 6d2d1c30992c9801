"""Training rows as users hold them: JSON lines, LLaMA-Factory's alpaca and sharegpt files, plain text. No torch.

A bad row names its file and its line (or its place in a JSON array).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..fields import build
from ..files import parse_json, read_json, read_lines, read_text
from .recipe import DataSpec

MOST_BYTES = 1 << 32
"""Of an array of rows."""
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a chat."""

    role: Role
    text: str


@dataclass(frozen=True)
class Row:
    """A prompt and a completion as they stand (an empty prompt: all carries loss), or the turns of a chat."""

    prompt: str = ""
    completion: str = ""
    chat: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        """All of it, for learning a tokenizer."""
        return "\n".join(turn.text for turn in self.chat) or self.prompt + self.completion


@dataclass(frozen=True)
class Columns:
    """Names of a dataset's fields, LLaMA-Factory's own as defaults."""

    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    system: str = "system"
    history: str = "history"
    messages: str = "conversations"


@dataclass(frozen=True)
class Tags:
    """Names inside the turns of a sharegpt dataset."""

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
    """One file and how to read it."""

    file: Path
    columns: Columns = field(default_factory=Columns)
    tags: Tags | None = None


def sources(data: DataSpec) -> list[Source]:
    """The files a recipe names, directly or by dataset_info.json. Raises ConfigError naming what is missing."""
    found = [Source(Path(name)) for name in data.files]
    if data.dataset_info is not None:
        found += [_registered(Path(data.dataset_info), name) for name in data.datasets]
    for source in found:
        if not source.file.is_file():
            raise ConfigError(f"data: {source.file}: no such file")
    return found


def _registered(info: Path, name: str) -> Source:
    """An entry of LLaMA-Factory's dataset_info.json; its file_name counts from the file's own folder."""
    entries = read_json(info)
    if name not in entries:
        raise ConfigError(f"data.datasets: {name!r} is not in {info}; known: {', '.join(entries)}")
    entry = entries[name]
    if "file_name" not in entry:
        raise ConfigError(f"{info}: {name} has no file_name; sets from a hub are not fetched, save it as a file first")
    if entry.get("ranking"):
        raise ConfigError(f"{info}: {name} holds ranked pairs, which no stage here trains on")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{info}: {name}: formatting={formatting!r} is unknown; known: alpaca, sharegpt, openai")
    known = Columns.__dataclass_fields__
    columns = build(Columns, {k: v for k, v in entry.get("columns", {}).items() if k in known}, f"{name}.columns.")
    default = OPENAI if formatting == "openai" else Tags()
    tags = None if formatting == "alpaca" else build(Tags, {**vars(default), **entry.get("tags", {})}, f"{name}.tags.")
    return Source(info.parent / entry["file_name"], columns, tags)


def read_rows(source: Source) -> Iterator[Row]:
    """Rows of a file: .jsonl or .json (an array), either as .gz, or .txt with a blank line between rows."""
    for where, value in _values(source.file):
        try:
            yield _row(value, source)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"{source.file}, {where}: not a training row: {what}") from error


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row's place in words and its value."""
    kind = (file.suffixes or [""])[-2 if file.suffix == ".gz" and len(file.suffixes) > 1 else -1]
    if kind == ".txt":
        yield from _paragraphs(file)
    elif kind == ".json":
        rows = _json(read_text(file, MOST_BYTES), str(file))
        if not isinstance(rows, list):
            raise ConfigError(f"{file}: a .json file must hold an array of rows; one row a line is .jsonl")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    else:
        for number, line in read_lines(file):
            yield f"line {number}", _json(line, f"{file}, line {number}")


def _paragraphs(file: Path) -> Iterator[tuple[str, Any]]:
    """Lines without a blank one between them."""
    lines = list(read_lines(file))
    starts = [0, *(i for i in range(1, len(lines)) if lines[i][0] > lines[i - 1][0] + 1), len(lines)]
    for number, (start, end) in enumerate(pairwise(starts), 1):
        if text := "".join(line for _, line in lines[start:end]).strip():
            yield f"paragraph {number}", {"text": text}


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not a training row: {error}") from error


def _row(value: Mapping[str, Any], source: Source) -> Row:
    """What the row says, its form told by its fields where the source does not say it."""
    columns, tags = source.columns, source.tags
    if not isinstance(value, Mapping):
        raise ValueError("a row must be an object")
    if tags is None and columns.messages in value:
        tags = Tags()
    elif tags is None and "messages" in value:
        tags, columns = OPENAI, Columns(messages="messages")
    if tags is not None:
        return Row(chat=_turns(value, columns, tags))
    if "text" in value:
        return Row("", _text(value, "text"))
    if columns.response in value:
        return Row(chat=_alpaca(value, columns))
    return Row(_text(value, "prompt", empty=True), _text(value, "completion"))


def _text(value: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    text = value[name]
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f"{name} must be text" + ("" if empty else " and not empty"))
    return text


def _alpaca(value: Mapping[str, Any], columns: Columns) -> tuple[Turn, ...]:
    turns = [Turn("system", value[columns.system])] if value.get(columns.system) else []
    for asked, said in value.get(columns.history) or []:
        turns += [Turn("user", str(asked)), Turn("assistant", str(said))]
    asked = "\n".join(part for part in (value[columns.prompt], value.get(columns.query)) if part)
    return (*turns, Turn("user", asked), Turn("assistant", _text(value, columns.response)))


def _turns(value: Mapping[str, Any], columns: Columns, tags: Tags) -> tuple[Turn, ...]:
    roles: dict[str, Role] = {
        tags.user_tag: "user", tags.observation_tag: "user", tags.assistant_tag: "assistant",
        tags.function_tag: "assistant", tags.system_tag: "system",
    }  # fmt: skip
    turns = [Turn("system", value[columns.system])] if value.get(columns.system) else []
    for message in value[columns.messages]:
        role = message[tags.role_tag]
        if role not in roles:
            raise ValueError(f"role {role!r} is unknown; known: {', '.join(roles)}")
        turns.append(Turn(roles[role], _text(message, tags.content_tag, empty=role != tags.assistant_tag)))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError("no turn of the assistant to learn from")
    return tuple(turns)


def load_rows(data: DataSpec) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows. Raises ConfigError if too few are left to train on."""
    rows = [row for source in sources(data) for row in read_rows(source)]
    if len(rows) <= data.held_out:
        raise ConfigError(f"data: {len(rows)} rows, data.held_out={data.held_out} leaves none to train on")
    return rows[: -data.held_out], rows[-data.held_out :]


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and sha256 of a data file, for the checkpoint's manifest."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
