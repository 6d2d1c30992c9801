"""The record of one sample: its fields, and its line in samples.jsonl with a checksum. Neither torch nor lm-eval.

A generated answer (generate_until), as stored when the run ends:

    {"key": "gsm8k/0",                    TASK/DOCUMENT, and /2, /3 … for further answers to one document
     "task": "gsm8k", "doc_id": 0, "prompt": "Question: …", "prompt_hash": "9f0c…", "prompt_tokens": 412,
     "truncated": 0,                      prompt tokens cut from the left to fit the window
     "output": " 2 …",                    the text up to the stop string or end token
     "output_ids": [29871, …],            its token ids
     "finish": "eos",                     eos | stop | length | broken (non-finite row) | lost (request failed)
     "seconds": 0.8,                      its share of the engine's time
     "trace": {"forwards": {"prefill": 1, "round": 40},     forwards by kind
               "slots": 911,                                slots fed in all of them
               "predicted": [4, …], "accepted": [3, …],     stride drafted, length accepted, of each step
               "expected": [2.8, …],                        length expected by the draft's probabilities
               "written": [1, 1, 2, …], "rejected": […]},   forward that committed each token; rejected draft tokens
     "extracted": {"strict-match": "2"}, "target": "2", "scores": {"exact_match,strict-match": 1.0},
     "crc32": "1ebb2838"}                 of the line without this field

A likelihood answer has `"finish": null`, no output ids, and `choices`, `loglikelihoods` and `greedy`, one of each a
choice.

An answer that another program wrote (an lm-eval backend, an imported log) says what is known of it. Unknown is null,
never 0: `output_ids`, `seconds`, the trace's `forwards` and `slots`. `tokens` is their number where it was counted
without the ids, `counted` how; `"finish": "unknown"` where nothing says how the answer ended.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from fluid_model.common.files import parse_json

from .value_checks import Check, amount, below, by_name, count, each, flag, maybe, number, row, table, text, wrong

Record = dict[str, Any]
WIDEST = 1 << 16
"""Above the stride of any decoder."""
IDS = 1 << 31
"""Above any token id."""
FIELDS: dict[str, Check] = {
    "key": text, "task": text, "doc_id": count, "prompt": text, "prompt_hash": text, "output": text,
    "output_ids": maybe(each(below(IDS))), "finish": maybe(text), "trace": lambda value: isinstance(value, dict),
    "seconds": maybe(amount),
}  # fmt: skip
"""Fields of every sample."""
COUNTS: dict[str, Check] = {
    "forwards": maybe(by_name(count)), "slots": maybe(count),
    "predicted": each(below(WIDEST)), "accepted": each(below(WIDEST)),
}  # fmt: skip
"""Fields of every trace."""
STEPS: dict[str, Check] = {
    "written": each(count),
    "rejected": each(row(count, count, each(below(IDS)))),
    "expected": each(amount),
}
"""Fields of traces that earlier versions did not write."""
OPTIONAL_FIELDS: dict[str, Check] = {
    "scores": by_name(number), "extracted": by_name(text), "lost": text, "truncated": maybe(count),
    "prompt_tokens": maybe(count),
    "broken": flag, "pieces": each(text), "rejected": each(text), "raw_output": text, "thinking_ended": flag,
    "choices": each(text), "loglikelihoods": each(number), "standard_errors": each(maybe(number)),
    "greedy": each(flag), "tokens": maybe(count), "counted": text, "target": text,
    "verdicts": each(table({"result": text, "isolation": text})),
}  # fmt: skip
"""Fields of some samples."""
CHECKSUM = b', "crc32": "'
"""Start of a line's last field, the CRC-32 of the bytes before it."""
UNKNOWN = "unknown"
"""The finish of an answer of which nothing says how it ended."""
UNKNOWN_TRACE: Mapping[str, Any] = {"forwards": None, "slots": None, "predicted": [], "accepted": []}
"""The trace of an answer that another program wrote."""


def check_record(record: Record) -> None:
    """Raise ValueError unless a record has the fields of a sample, of their types, with consistent lengths."""
    if problem := wrong(record, FIELDS, OPTIONAL_FIELDS):
        raise ValueError(problem)
    trace = record["trace"]
    if problem := wrong(trace, COUNTS, STEPS):
        raise ValueError(f"of its trace, {problem}")
    if 0 in trace["predicted"]:
        raise ValueError("of its trace, predicted holds a stride of 0")
    written = len(trace.get("written", ()))
    tokens = len(record["output_ids"] or ())
    if written not in (0, tokens):
        raise ValueError(f"of its trace, written tells of {written} tokens, and there are {tokens}")
    lengths = {len(record[name]) for name in ("choices", "loglikelihoods", "greedy") if name in record}
    if len(lengths) > 1:
        raise ValueError("choices, loglikelihoods and greedy differ in length")


def tokens_of(record: Mapping[str, Any]) -> int | None:
    """Tokens of an answer: its ids, or as counted without them; None where unknown."""
    ids = record["output_ids"]
    tokens: int | None = record.get("tokens") if ids is None else len(ids)
    return tokens


def forwards_of(record: Mapping[str, Any]) -> int | None:
    """Forwards of an answer, of all kinds; None where unknown."""
    by_kind = record["trace"]["forwards"]
    return None if by_kind is None else sum(by_kind.values())


def parse(line: bytes) -> Record:
    """The record of a line. Raises ValueError if the line is no record, or its checksum differs."""
    body, separator, checksum = line.rstrip(b"\n").rpartition(CHECKSUM)
    if not separator:
        raise ValueError("no checksum")
    if checksum != f'{zlib.crc32(body):08x}"}}'.encode():
        raise ValueError("its checksum is another")
    record = parse_json(body + b"}")
    if not isinstance(record, dict):
        raise ValueError("no object")
    return record


def encode(record: Record) -> bytes:
    """The line of a record, the inverse of `parse`."""
    body = json.dumps(record, ensure_ascii=True)[:-1].encode()
    return body + CHECKSUM + f'{zlib.crc32(body):08x}"}}\n'.encode()


def in_order(records: Iterable[Record], tasks: Iterable[str]) -> list[Record]:
    """Samples sorted by task, in the order of `tasks` (others last), then document.

    Answers arrive in any order. Sorted, bootstrap draws and listings depend on the samples alone.
    """
    rank = {task: place for place, task in enumerate(tasks)}
    return sorted(records, key=lambda r: (rank.get(r["task"], len(rank)), r["task"], r["doc_id"], r["key"]))
