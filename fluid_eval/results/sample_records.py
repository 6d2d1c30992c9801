"""A sample as a run keeps it: its fields, its line with a checksum, and what a line must hold to be one.

    {"key": "gsm8k/0", "task": "gsm8k", "doc_id": 0, "prompt": "Question: …", "prompt_hash": "…", "output": " 2 …",
     "output_ids": [29871, …], "finish": "eos", "seconds": 0.8, "scores": {"exact_match,strict-match": 1.0},
     "trace": {"forwards": {"prefill": 1, "round": 40}, "slots": 911, "predicted": [4, …], "accepted": [3, …]}, …}

No torch, no lm-eval.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

from fluid_model.common.files import parse_json

from .value_checks import Check, amount, below, by_name, count, each, flag, maybe, number, row, table, text, wrong

Record = dict[str, Any]
WIDEST = 1 << 16
"""Tokens of a round, above which no decoder goes."""
IDS = 1 << 31
"""Token ids are below it."""
FIELDS: dict[str, Check] = {
    "key": text, "task": text, "doc_id": count, "prompt": text, "prompt_hash": text, "output": text,
    "output_ids": each(below(IDS)), "finish": maybe(text), "trace": lambda value: isinstance(value, dict),
    "seconds": amount,
}  # fmt: skip
"""Fields every sample has, and what they hold."""
COUNTS: dict[str, Check] = {
    "forwards": by_name(count), "slots": count, "predicted": each(below(WIDEST)), "accepted": each(below(WIDEST)),
}  # fmt: skip
"""Fields of every trace."""
STEPS: dict[str, Check] = {
    "written": each(count),
    "rejected": each(row(count, count, each(below(IDS)))),
}
"""Fields of traces that tell which forward wrote what."""
MAYBE: dict[str, Check] = {
    "scores": by_name(number), "extracted": by_name(text), "lost": text, "truncated": count, "prompt_tokens": count,
    "broken": flag, "pieces": each(text), "rejected": each(text), "raw_output": text, "thinking_ended": flag,
    "choices": each(text), "loglikelihoods": each(number), "standard_errors": each(maybe(number)),
    "greedy": each(flag), "target": text, "verdicts": each(table({"result": text, "isolation": text})),
}  # fmt: skip
"""Fields that some samples have."""
CHECKSUM = b', "crc32": "'
"""Begins a line's last field: of the line without it."""


def check_record(record: Record) -> None:
    """Raise ValueError unless a record has what every sample has, and nothing in it contradicts itself."""
    if problem := wrong(record, FIELDS, MAYBE):
        raise ValueError(problem)
    trace = record["trace"]
    if problem := wrong(trace, COUNTS, STEPS):
        raise ValueError(f"of its trace, {problem}")
    if 0 in trace["predicted"]:
        raise ValueError("of its trace, predicted holds a stride of 0")
    written, tokens = len(trace.get("written", ())), len(record["output_ids"])
    if written not in (0, tokens):
        raise ValueError(f"of its trace, written tells of {written} tokens, and there are {tokens}")
    lengths = {len(record[name]) for name in ("choices", "loglikelihoods", "greedy") if name in record}
    if len(lengths) > 1:
        raise ValueError("choices, loglikelihoods and greedy differ in length")


def parse(line: bytes) -> Record:
    """A line's record. Raises ValueError where it is none, or not what was written."""
    body, sign, check = line.rstrip(b"\n").rpartition(CHECKSUM)
    if not sign:
        raise ValueError("no checksum")
    if check != f'{zlib.crc32(body):08x}"}}'.encode():
        raise ValueError("its checksum is another")
    record = parse_json(body + b"}")
    if not isinstance(record, dict):
        raise ValueError("no object")
    return record


def encode(record: Record) -> bytes:
    """A record's line, which `parse` reads."""
    body = json.dumps(record, ensure_ascii=True)[:-1].encode()
    return body + CHECKSUM + f'{zlib.crc32(body):08x}"}}\n'.encode()


def in_order(records: Iterable[Record], tasks: Iterable[str]) -> list[Record]:
    """Samples by task, those of other tasks last, and document, in whatever order answers came: what is drawn by place,
    or listed, is the same for the same samples.
    """
    places = {task: place for place, task in enumerate(tasks)}
    return sorted(records, key=lambda r: (places.get(r["task"], len(places)), r["task"], r["doc_id"], r["key"]))
