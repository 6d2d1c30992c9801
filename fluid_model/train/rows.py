"""Data rows: JSON lines or arrays of alpaca, sharegpt, OpenAI and prompt/completion rows, and plain text. No torch.

One row of each form; further names of fields come with a register (`register`):

    prompt, completion  {"prompt": "Q: 1+1? A:", "completion": " 2"}
    text                {"text": "Once upon a time"}
    alpaca              {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.",
                         "history": [["Hi", "Hello"]]}
    sharegpt            {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}
    OpenAI              {"messages": [{"role": "user", "content": "1+1?"},
                                      {"role": "assistant", "content": "2", "weight": 1}]}
    .txt                Once upon a time
                        there was a cat.            <- one row per paragraph

An error names the file and the line (or the row's number in a JSON array). A row that fits two forms is refused. So are
fields that no stage trains on: tools, images, feedback, a weight other than 0 and 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ConfigError
from ..common.files import parse_json, read_lines, read_text
from .recipe import DataSpec
from .register import OPENAI_TAGS, Columns, DataSource, Tags, data_sources

MAX_ARRAY_BYTES = 1 << 32
"""Size limit of a file with a JSON array."""
TURN_WEIGHTS = ("weight", "loss_weight", "train", "training")
"""Fields by which a turn says whether it carries a loss: OpenAI's, LLaMA-Factory's (v1), axolotl's two."""
CONTEXT_COLUMNS = ("tools", "images", "videos", "audios")
"""Columns of model inputs beside the text."""
UNSUPPORTED_PARTS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
    "image",
    "audio",
)
"""Fields of a turn beside its text; training on the text alone would drop them."""
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ChatTurn:
    """One turn of a chat. loss: whether it carries a loss, if it is the assistant's."""

    role: Role
    text: str
    loss: bool = True


@dataclass(frozen=True)
class DataRow:
    """A prompt and its completion (without a prompt, the completion is a text to learn), or the turns of a chat."""

    prompt: str = ""
    completion: str = ""
    chat: tuple[ChatTurn, ...] = ()

    @property
    def text(self) -> str:
        """All of its text, for training a tokenizer."""
        return "\n".join(turn.text for turn in self.chat) or self.prompt + self.completion


def load_rows(data: DataSpec) -> tuple[list[DataRow], list[DataRow]]:
    """Training rows, and held-out rows from the end. Raises ConfigError if no training rows are left."""
    rows: list[DataRow] = []
    for source in data_sources(data):
        rows += islice(read_rows(source), data.max_rows)
    held_out = math.ceil(data.held_out * len(rows)) if isinstance(data.held_out, float) else data.held_out
    if not 0 < held_out < len(rows):
        raise ConfigError(f"data: {len(rows)} rows, data.held_out={data.held_out} leaves none to train on")
    return rows[:-held_out], rows[-held_out:]


def read_rows(source: DataSource) -> Iterator[DataRow]:
    """Rows of a source: a JSON array or JSON lines, gzipped or not, or .txt with a blank line between rows.

    Rows of weight 0 are skipped. With `num_samples`, the same rows are drawn every time, in their own order.
    Raises ConfigError naming the file and the row.
    """
    if source.num_samples is None:
        yield from _read_all(source)
        return
    rows, count = list(_read_all(source)), source.num_samples
    if count > len(rows):
        raise ConfigError(f"{source.file}: num_samples={count}, and it holds {len(rows)} rows; rows are not repeated")
    drawn = random.Random(f"{source.file.name}/{count}").sample(range(len(rows)), count)
    yield from (rows[place] for place in sorted(drawn))


def _read_all(source: DataSource) -> Iterator[DataRow]:
    for file in source.files:
        for where, value in _values(file):
            try:
                row = _parse_row(value, source)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                why = f"missing {error}" if isinstance(error, KeyError) else str(error)
                raise ConfigError(f"{file}, {where}: not a training row: {why}") from error
            if row is not None:
                yield row


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    """("line 3", its JSON value) of each row. Content decides between array and lines, not the file's name."""
    suffixes = file.suffixes or [""]
    kind = suffixes[-2] if file.suffix == ".gz" and len(suffixes) > 1 else suffixes[-1]
    if kind == ".txt":
        yield from _paragraphs(file)
        return
    _, first_line = next(read_lines(file), (1, ""))
    if first_line.lstrip().startswith("["):
        rows = _parse(read_text(file, MAX_ARRAY_BYTES), str(file))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in read_lines(file):
        yield f"line {number}", _parse(line, f"{file}, line {number}")


def _paragraphs(file: Path) -> Iterator[tuple[str, Any]]:
    """("paragraph 2", a text row) of each run of lines between blank ones."""
    lines = list(read_lines(file))  # (line number, text), blank lines skipped
    starts = [i for i in range(1, len(lines)) if lines[i][0] > lines[i - 1][0] + 1]
    for number, (start, end) in enumerate(pairwise([0, *starts, len(lines)]), 1):
        if text := "".join(line for _, line in lines[start:end]).strip():
            yield f"paragraph {number}", {"text": text}


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not a training row: {error}") from error


def _parse_row(value: Mapping[str, Any], source: DataSource) -> DataRow | None:
    """The row, or None where its weight is 0. Raises ValueError or KeyError."""
    if not isinstance(value, Mapping):
        raise ValueError("a row must be an object")
    columns, tags = source.columns, source.tags
    _refuse_unsupported(value, columns)
    # 1) a register names the form
    if tags is not None:
        return _parse_chat(value, columns, tags)
    if source.registered:
        return _parse_alpaca(value, columns)
    # 2) without one, the row's own fields do
    if not _carries_loss(value, ("weight",)):
        return None
    learnt = _learnt_field(value, columns)
    if learnt == columns.messages:
        return _parse_chat(value, columns, Tags())
    if learnt == "messages":
        return _parse_chat(value, Columns(messages="messages"), OPENAI_TAGS)
    if learnt == columns.response:
        return _parse_alpaca(value, columns)
    if learnt == "text":
        return DataRow("", _text(value, "text"))
    return DataRow(_text(value, "prompt", empty=True), _text(value, "completion"))


def _learnt_field(value: Mapping[str, Any], columns: Columns) -> str:
    """The field to learn, which identifies a row's form. Raises ValueError unless exactly one is present."""
    names = dict.fromkeys(("completion", "text", columns.response, columns.messages, "messages"))
    known = [name for name in names if name is not None]
    present = [name for name in known if value.get(name) is not None]
    if not present:
        raise ValueError(f"missing {known[0]!r} (or {', '.join(known[1:])})")
    if len(present) > 1:
        raise ValueError(f"{' and '.join(present)}: which is to be learnt? Leave one, or name columns in a register")
    return present[0]


def _refuse_unsupported(value: Mapping[str, Any], columns: Columns) -> None:
    """Raise ValueError for fields with a meaning that would be ignored."""
    for kind in CONTEXT_COLUMNS:
        if (name := getattr(columns, kind)) is not None and _has_value(value, name):
            raise ValueError(f"{name}: no stage here shows {kind} to a model; take the field out to train without")
    for name in (columns.chosen, columns.rejected, columns.kto_tag):
        if name is not None and _has_value(value, name):
            raise ValueError(f"{name}: no stage here trains on feedback or ranked pairs")
    if columns.kto_tag is not None and isinstance(value.get("label"), bool):  # TRL's name of kto_tag
        raise ValueError("label: no stage here trains on feedback or ranked pairs")


def _has_value(value: Mapping[str, Any], name: str) -> bool:
    return value.get(name) not in (None, "", [], {})


def _carries_loss(value: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a row or a turn carries a loss. Raises ValueError for a weight other than 0 and 1."""
    weights = {name: value[name] for name in names if value.get(name) is not None}
    for name, weight in weights.items():
        if weight not in (0, 1):
            raise ValueError(f"{name}={weight!r} must be 0 or 1")
    return all(weights.values())


def _text(value: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    text = value[name]
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f"{name} must be text" + ("" if empty else " and not empty"))
    return text


def _optional_text(value: Mapping[str, Any], name: str | None) -> str:
    return "" if name is None or value.get(name) is None else _text(value, name, empty=True)


def _parse_alpaca(value: Mapping[str, Any], columns: Columns) -> DataRow:
    """An alpaca row as a chat; without a response column, its prompt is a text to learn."""
    # 1) the user's turn: prompt and query joined by a newline
    if columns.prompt is not None and columns.prompt not in value:
        raise KeyError(columns.prompt)
    parts = (_optional_text(value, columns.prompt), _optional_text(value, columns.query))
    prompt = "\n".join(part for part in parts if part)
    if columns.response is None:
        if not prompt:
            raise ValueError(f"{columns.prompt} must be text and not empty")
        return DataRow("", prompt)
    # 2) system prompt and earlier turns
    turns = []
    if system := _optional_text(value, columns.system):
        turns.append(ChatTurn("system", system))
    history = value.get(columns.history) if columns.history is not None else None
    for pair in history or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{columns.history} must be a list of pairs of texts")
        turns += [ChatTurn("user", pair[0]), ChatTurn("assistant", pair[1])]
    # 3) the last exchange
    response = _text(value, columns.response)
    return DataRow(chat=(*turns, ChatTurn("user", prompt), ChatTurn("assistant", response)))


def _parse_chat(value: Mapping[str, Any], columns: Columns, tags: Tags) -> DataRow | None:
    """A sharegpt or OpenAI row; None where no turn of the assistant carries a loss.

    An opening system message takes precedence over the system column, as in LLaMA-Factory.
    """
    messages = value[str(columns.messages)]
    if not isinstance(messages, list):
        raise ValueError(f"{columns.messages} must be a list of turns")
    turns = [_parse_turn(message, tags) for message in messages]
    if (system := _optional_text(value, columns.system)) and not (turns and turns[0].role == "system"):
        turns = [ChatTurn("system", system), *turns]
    responses = [turn for turn in turns if turn.role == "assistant"]
    if not responses:
        raise ValueError("no turn of the assistant to learn from")
    return DataRow(chat=tuple(turns)) if any(turn.loss for turn in responses) else None


def _parse_turn(message: Mapping[str, Any], tags: Tags) -> ChatTurn:
    # 1) refuse parts that training on the text alone would drop
    roles: dict[str, Role] = {tags.user_tag: "user", tags.assistant_tag: "assistant", tags.system_tag: "system"}
    tag = message[tags.role_tag]
    dropped = next((name for name in UNSUPPORTED_PARTS if _has_value(message, name)), None)
    if dropped is not None or tag in (tags.observation_tag, tags.function_tag):
        part = dropped or f"role {tag!r}"
        raise ValueError(f"{part}: no stage here writes it as the model's template does; write it into the text")
    if tag not in roles:
        raise ValueError(f"role {tag!r} is unknown; known: {', '.join(roles)}")
    # 2) role and loss
    role, loss = roles[tag], _carries_loss(message, TURN_WEIGHTS)
    if role != "assistant" and loss and any(message.get(name) for name in TURN_WEIGHTS):
        raise ValueError(f"role {tag!r} is weighed 1; only the assistant's turns are learnt")
    # 3) text; only a turn to learn must have some
    return ChatTurn(role, _text(message, tags.content_tag, empty=role != "assistant" or not loss), loss)


def fingerprint(file: Path) -> dict[str, Any]:
    """Name, sha256 and size of a data file, for training.json."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
