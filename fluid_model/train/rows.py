"""Training rows as users hold them: JSON lines, alpaca and sharegpt rows, plain text. No torch.

A bad row names its file and its line (or its place in a JSON array). A row that fits two forms is refused, and so is
one that says what no stage here honours: tools, pictures, feedback, a weight that is neither 0 nor 1.
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
from .register import OPENAI, Columns, Source, Tags, sources

MOST_BYTES = 1 << 32
"""Of an array of rows."""
WEIGHTS = ("weight", "loss_weight", "train", "training")
"""Names by which a turn says whether it carries loss: OpenAI's, LLaMA-Factory's (v1), axolotl's two."""
UNSHOWN = ("tools", "images", "videos", "audios")
"""Columns of what a model would have to be shown beside the text."""
UNSAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "image", "audio")
"""Parts of a turn that would be lost."""
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a chat. loss: whether it is learnt, if it is the assistant's."""

    role: Role
    text: str
    loss: bool = True


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


def load_rows(data: DataSpec) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, the last ones. Raises ConfigError if too few are left to train on."""
    rows = [row for source in sources(data) for row in islice(read_rows(source), data.max_rows)]
    held = math.ceil(data.held_out * len(rows)) if isinstance(data.held_out, float) else data.held_out
    if not 0 < held < len(rows):
        raise ConfigError(f"data: {len(rows)} rows, data.held_out={data.held_out} leaves none to train on")
    return rows[:-held], rows[-held:]


def read_rows(source: Source) -> Iterator[Row]:
    """Rows of a source: a JSON array or JSON lines, either as .gz, or .txt with a blank line between rows.

    A row whose weight is 0 is left out: it carries no loss. Raises ConfigError naming the file and the row.
    """
    if source.num_samples is None:
        yield from _every_row(source)
        return
    rows, wanted = list(_every_row(source)), source.num_samples
    if wanted > len(rows):
        raise ConfigError(f"{source.file}: num_samples={wanted}, and it holds {len(rows)} rows; rows are not repeated")
    drawn = random.Random(f"{source.file.name}/{wanted}").sample(range(len(rows)), wanted)  # the same ones every time
    yield from (rows[place] for place in sorted(drawn))


def _every_row(source: Source) -> Iterator[Row]:
    for file in source.files:
        for where, value in _values(file):
            try:
                row = _row(value, source)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"missing {error}" if isinstance(error, KeyError) else str(error)
                raise ConfigError(f"{file}, {where}: not a training row: {what}") from error
            if row is not None:
                yield row


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row's place in words and its value. A JSON file is an array or lines, whatever its name says."""
    kind = (file.suffixes or [""])[-2 if file.suffix == ".gz" and len(file.suffixes) > 1 else -1]
    if kind == ".txt":
        yield from _paragraphs(file)
        return
    _, first = next(read_lines(file), (1, ""))
    if first.lstrip().startswith("["):
        rows = _json(read_text(file, MOST_BYTES), str(file))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
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


def _row(value: Mapping[str, Any], source: Source) -> Row | None:
    """The row, or None where it says that it carries no loss."""
    if not isinstance(value, Mapping):
        raise ValueError("a row must be an object")
    columns, tags = source.columns, source.tags
    _refuse_unhonoured(value, columns)
    if source.registered or tags is not None:
        return _chat(value, columns, tags) if tags is not None else _alpaca(value, columns)
    if not _carries_loss(value, ("weight",)):
        return None
    mark = _mark(value, columns)
    if mark == columns.messages:
        return _chat(value, columns, Tags())
    if mark == "messages":
        return _chat(value, Columns(messages="messages"), OPENAI)
    if mark == columns.response:
        return _alpaca(value, columns)
    if mark == "text":
        return Row("", _text(value, "text"))
    return Row(_text(value, "prompt", empty=True), _text(value, "completion"))


def _mark(value: Mapping[str, Any], columns: Columns) -> str:
    """The field that carries the loss, which tells a row's form. Raises ValueError unless there is exactly one."""
    names = dict.fromkeys(("completion", "text", columns.response, columns.messages, "messages"))
    known = [name for name in names if name is not None]
    there = [name for name in known if value.get(name) is not None]
    if not there:
        raise ValueError(f"missing {known[0]!r} (or {', '.join(known[1:])})")
    if len(there) > 1:
        raise ValueError(f"{' and '.join(there)}: which is to be learnt? Leave one, or name columns in a register")
    return there[0]


def _refuse_unhonoured(value: Mapping[str, Any], columns: Columns) -> None:
    """Raises ValueError for what a row says that would be ignored."""
    for kind in UNSHOWN:
        if (name := getattr(columns, kind)) is not None and _holds(value, name):
            raise ValueError(f"{name}: no stage here shows {kind} to a model; take the field out to train without")
    feedback = (columns.chosen, columns.rejected, columns.kto_tag)
    name = next((name for name in feedback if name is not None and _holds(value, name)), None)
    if name is None and columns.kto_tag is not None and isinstance(value.get("label"), bool):
        name = "label"  # TRL's name of it
    if name is not None:
        raise ValueError(f"{name}: no stage here trains on feedback or ranked pairs")


def _holds(value: Mapping[str, Any], name: str) -> bool:
    return value.get(name) not in (None, "", [], {})


def _carries_loss(value: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a row or a turn is learnt. Raises ValueError for a weight that is neither 0 nor 1."""
    said = {name: value[name] for name in names if value.get(name) is not None}
    for name, weight in said.items():
        if weight not in (0, 1):
            raise ValueError(f"{name}={weight!r} must be 0 or 1")
    return all(said.values())


def _text(value: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    text = value[name]
    if not isinstance(text, str) or not (text or empty):
        raise ValueError(f"{name} must be text" + ("" if empty else " and not empty"))
    return text


def _maybe(value: Mapping[str, Any], name: str | None) -> str:
    """Text that may be missing."""
    return "" if name is None or value.get(name) is None else _text(value, name, empty=True)


def _alpaca(value: Mapping[str, Any], columns: Columns) -> Row:
    """prompt and query one under the other; without a response column they are a text to learn."""
    if columns.prompt is not None and columns.prompt not in value:
        raise KeyError(columns.prompt)
    asked = "\n".join(part for part in (_maybe(value, columns.prompt), _maybe(value, columns.query)) if part)
    if columns.response is None:
        if not asked:
            raise ValueError(f"{columns.prompt} must be text and not empty")
        return Row("", asked)
    turns = [Turn("system", system)] if (system := _maybe(value, columns.system)) else []
    for pair in (value.get(columns.history) or []) if columns.history is not None else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{columns.history} must be a list of pairs of texts")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return Row(chat=(*turns, Turn("user", asked), Turn("assistant", _text(value, columns.response))))


def _chat(value: Mapping[str, Any], columns: Columns, tags: Tags) -> Row | None:
    """A system message that opens the chat stands for the system column, as in LLaMA-Factory."""
    messages = value[str(columns.messages)]
    if not isinstance(messages, list):
        raise ValueError(f"{columns.messages} must be a list of turns")
    turns = [_turn(message, tags) for message in messages]
    if (system := _maybe(value, columns.system)) and not (turns and turns[0].role == "system"):
        turns = [Turn("system", system), *turns]
    spoken = [turn for turn in turns if turn.role == "assistant"]
    if not spoken:
        raise ValueError("no turn of the assistant to learn from")
    return Row(chat=tuple(turns)) if any(turn.loss for turn in spoken) else None


def _turn(message: Mapping[str, Any], tags: Tags) -> Turn:
    roles: dict[str, Role] = {tags.user_tag: "user", tags.assistant_tag: "assistant", tags.system_tag: "system"}
    tagged = message[tags.role_tag]
    lost = next((name for name in UNSAID if _holds(message, name)), None)
    if lost is not None or tagged in (tags.observation_tag, tags.function_tag):
        what = lost or f"role {tagged!r}"
        raise ValueError(f"{what}: no stage here writes it as the model's template does; write it into the text")
    if tagged not in roles:
        raise ValueError(f"role {tagged!r} is unknown; known: {', '.join(roles)}")
    role, loss = roles[tagged], _carries_loss(message, WEIGHTS)
    if role != "assistant" and loss and any(message.get(name) for name in WEIGHTS):
        raise ValueError(f"role {tagged!r} is weighed 1; only what the assistant says is learnt")
    return Turn(role, _text(message, tags.content_tag, empty=role != "assistant" or not loss), loss)


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and sha256 of a data file, for the checkpoint's manifest."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
