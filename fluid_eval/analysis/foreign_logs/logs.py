"""What the readers of other harnesses' logs give: one `ForeignLog` for each file, with a `ForeignSample` an answer.

A field that the log does not state is None, or empty; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluid_model.common import files
from fluid_model.common.errors import ConfigError

from ...results.sample_records import UNKNOWN

ONE_ANSWER = "import takes one answer a document"


@dataclass(frozen=True)
class ForeignSample:
    """One answer of a log. where: file and line, for messages.

    document: the log's number or name of the document.  prompt, target: None where the log has none.
    scores: by "METRIC,FILTER".  extracted: by filter.  finish: unknown, stop or length; None of likelihood questions.
    tokens: as the log counts them.  failure: why there is no answer.
    choices, loglikelihoods, greedy: of likelihood questions, one of each a choice.
    """

    where: str
    document: int | str
    prompt: str | None
    output: str
    target: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    extracted: Mapping[str, str] = field(default_factory=dict)
    finish: str | None = UNKNOWN
    tokens: int | None = None
    failure: str | None = None
    choices: Sequence[str] = ()
    loglikelihoods: Sequence[float] = ()
    greedy: Sequence[bool] = ()


@dataclass(frozen=True)
class ForeignLog:
    """One task's answers of one model.

    harness: who wrote them, such as lm-eval; `backend` and its `args` as far as the log names them.
    task: as the harness calls it.  model: None where the log does not say.
    settings: what the log says of the protocol (num_fewshot, until, max_gen_toks, version, extractors, metrics).
    sampled: answers were drawn at a temperature above 0; None where unknown.
    """

    file: Path
    harness: str
    task: str
    model: str | None
    samples: Sequence[ForeignSample]
    backend: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    started: str | None = None
    seconds: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool | None = None
    chat: bool = False
    limit: int | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notices: Sequence[str] = ()


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """("FILE, line N", object) of a JSON lines file. Raises ConfigError naming a line that is no JSON object."""
    for number, line in files.read_lines(file):
        where = f"{file}, line {number}"
        try:
            row = files.parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: no JSON, perhaps cut short ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: no JSON object")
        yield where, row


def read_samples(
    rows: Iterator[tuple[str, Any]], harness: str, read: Callable[[str, Any], ForeignSample]
) -> list[ForeignSample]:
    """A sample of each row. Raises ConfigError naming the row that is none, and a document that occurs twice."""
    samples: dict[int | str, ForeignSample] = {}
    for where, row in rows:
        try:
            sample = read(where, row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{where}: no sample as {harness} writes it ({type(error).__name__}: {error})") from error
        if before := samples.get(sample.document):
            raise ConfigError(f"{where}: document {sample.document} is in {before.where} too; {ONE_ANSWER}")
        samples[sample.document] = sample
    return list(samples.values())


def message_text(content: Any) -> str:
    """The text of a chat message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")


def conversation(messages: Any) -> str:
    """The text of a prompt: as it is, or its messages with blank lines between them."""
    if isinstance(messages, str):
        return messages
    return "\n\n".join(message_text(message["content"]) for message in messages)
