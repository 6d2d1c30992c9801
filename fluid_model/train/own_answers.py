"""`fluid-train write-answers`: a model's own greedy answers to given prompts, as training rows.

Drafts are verified against the parent's own text, so they are best learnt on it. Each prompt of a data file becomes a
row with the model's answer in place of the file's:

    {"row": 12, "messages": [{"role": "user", ...}, {"role": "assistant", ...}], "finish": "eos"}
    {"row": 12, "prompt": "Question: ...", "completion": " ...", "finish": "length"}          without --chat

OUT.origin.json beside the rows holds what they depend on, and the first prompt without an answer. An interrupted run
goes on from there; another model, other prompts or settings are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from ..checkpoints import checkpoint as checkpoints
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.weights import fingerprint
from ..common import files
from ..common.errors import ConfigError
from ..decoders import engine_for
from ..engine.records import Generation, Request
from ..settings import ArSettings
from .recipe import DataSpec
from .register import data_sources
from .rows import DataRow, read_rows

CHUNK = 4
"""Batches of prompts between two writes; their answers are lost by an interruption."""


@dataclass(frozen=True)
class AnswerSettings:
    """What the answers depend on, beside model and prompts.  chat: render prompts by the chat template."""

    chat: bool = False
    max_new_tokens: int = 256


@dataclass
class Counts:
    """Prompts answered, rows written, answers that hit the length limit, answers left out.

    An answer is left out if it is empty, or if its text does not tokenise to the ids that the model wrote.
    """

    prompts: int = 0
    rows: int = 0
    unfinished: int = 0
    left_out: int = 0


def write_answers(
    model: str, prompts: Path, out: Path, settings: AnswerSettings, *, limit: int | None = None,
    batch_size: int = 32, dtype: str = "auto",
) -> Counts:  # fmt: skip
    """Append the answers of prompts that have none yet.  limit: prompts from the file's start.

    Raises ConfigError for unusable prompts, a model that cannot be loaded, and an `out` that holds other answers.
    """
    # 1) prompts and model
    (source,) = data_sources(DataSpec(files=(str(prompts),)))
    rows = list(islice(read_rows(source), limit))
    checkpoint = checkpoints.load(model, dtype=dtype)
    if settings.chat and checkpoint.tokenizer.chat_template is None:
        raise ConfigError(f"model={model}: its tokenizer has no chat template; leave --chat out")
    # 2) where to go on
    digest = hashlib.sha256(files.read_text(prompts).encode()).hexdigest()
    origin = {"model": model, "weights": fingerprint(checkpoint.model), "prompts": digest, **asdict(settings)}
    counts = _open(out, origin)
    # 3) answer chunk after chunk
    engine = engine_for(checkpoint, ArSettings(), batch_size)
    with tqdm(total=len(rows), initial=counts.prompts, unit="prompt", disable=None) as bar:
        while counts.prompts < len(rows):
            first = counts.prompts
            chunk = rows[first : first + CHUNK * batch_size]
            requests = [_request(checkpoint, row, first + n, settings) for n, row in enumerate(chunk)]
            answers = {answer.key: answer for answer in engine.generate(requests)}
            lines = []
            for number, row in enumerate(chunk, first):
                if (line := _line(checkpoint, row, answers[str(number)], settings, counts)) is not None:
                    lines.append(json.dumps({"row": number, **line}, ensure_ascii=False) + "\n")
            counts.prompts += len(chunk)
            _append(out, "".join(lines), origin, counts)
            bar.update(len(chunk))
    return counts


def _open(out: Path, origin: dict[str, Any]) -> Counts:
    """Counts of the answers in `out`, of which an interrupted write is cut off.

    Raises ConfigError if it holds answers of another model, other prompts or settings, or something else.
    """
    record = _origin_file(out)
    if not record.is_file():
        if out.exists():
            raise ConfigError(f"{out}: exists, and {record.name} does not; choose another file")
        out.parent.mkdir(parents=True, exist_ok=True)
        return Counts()
    stored = files.read_json(record)
    counts, size = Counts(**stored.pop("counts")), stored.pop("bytes")
    for name, value in origin.items():
        if stored.get(name) != value:
            raise ConfigError(f"{out}: holds answers with {name}={stored.get(name)}, not {value}; choose another file")
    if not out.is_file() or out.stat().st_size < size:
        raise ConfigError(f"{out}: shorter than {record.name} says; remove both to start anew")
    os.truncate(out, size)
    return counts


def _append(out: Path, text: str, origin: dict[str, Any], counts: Counts) -> None:
    """Append rows, then record them, so that a row is counted only when it is there."""
    with out.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    record = {**origin, "counts": asdict(counts), "bytes": out.stat().st_size}
    files.write(_origin_file(out), json.dumps(record, indent=2) + "\n")


def _origin_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.origin.json")


def _request(checkpoint: Checkpoint, row: DataRow, number: int, settings: AnswerSettings) -> Request:
    tokenizer = checkpoint.tokenizer
    if settings.chat:
        text = tokenizer.apply_chat_template(_turns(row), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(_prompt(row, number))["input_ids"]
    if len(ids) + settings.max_new_tokens > checkpoint.backbone.window:
        raise ConfigError(f"prompt {number + 1}: {len(ids)} tokens leave no room for {settings.max_new_tokens} more")
    return Request(str(number), tuple(ids), settings.max_new_tokens)


def _line(
    checkpoint: Checkpoint, row: DataRow, answer: Generation, settings: AnswerSettings, counts: Counts
) -> dict[str, Any] | None:
    """The training row of an answer, None for one that is left out."""
    again: Sequence[int] = checkpoint.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    if not answer.ids or tuple(again) != answer.ids:
        counts.left_out += 1
        return None
    counts.rows += 1
    counts.unfinished += answer.finish == "length"
    if settings.chat:
        turns = [*_turns(row), {"role": "assistant", "content": answer.text}]
        return {"messages": turns, "finish": answer.finish}
    return {"prompt": row.prompt, "completion": answer.text, "finish": answer.finish}


def _turns(row: DataRow) -> list[dict[str, str]]:
    """The turns before the last response; a prompt is one of the user's."""
    if not row.chat:
        return [{"role": "user", "content": row.prompt}]
    last = max(n for n, turn in enumerate(row.chat) if turn.role == "assistant")
    return [{"role": turn.role, "content": turn.text} for turn in row.chat[:last]]


def _prompt(row: DataRow, number: int) -> str:
    if row.chat:
        raise ConfigError(f"prompt {number + 1}: a chat; --chat renders it by the model's chat template")
    return row.prompt
