"""The samples of a page: JSON that no HTML can read, small enough to search in a browser.

A document's prompt stands once, with the answer of each run. The tokens of an answer are its text, their lengths, and
the forward each was written in, both packed: about two letters a token.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from ...results.health import RULES
from ...results.run_folder import Record
from .runs import Nested, Stored

MOST_SAMPLES = 2000
"""Documents a page holds at most; a browser searches that many without a pause."""
PAGE_BYTES = 4_600_000
"""What the samples may take in a page of 5 MB before their texts are cut shorter."""
CLIPS = ((6000, True), (6000, False), (3000, False), (1500, False), (750, False))
"""Characters kept of a text (what is left out is left out of its middle), and whether rejected drafts are kept: the
first that fits PAGE_BYTES."""
SHARED_LEAST = 200
"""A beginning that all prompts of a task share (few-shot examples) is stored once from this length on."""
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_THINKING = {True: "ended", False: "never ended", None: None}
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Block:
    """The samples as a page holds them. clip: characters kept of a text.  drafts: whether rejected drafts are there.

    shares: per task of the spec, documents shown and documents there are.
    """

    json: str
    clip: int
    drafts: bool
    shares: Mapping[str, tuple[int, int]]


def block(runs: Sequence[Stored]) -> Block:
    """Samples of these runs, by document, in the first run's order: as many and as much of each as a page may hold."""
    documents: dict[str, list[Record | None]] = {}
    owners = {leaf: task for run in reversed(runs) for leaf, task in run.owners.items()}
    for place, run in enumerate(runs):
        for record in run.records:
            documents.setdefault(record["key"], [None] * len(runs))[place] = record
    first = {key: next(record for record in answers if record) for key, answers in documents.items()}
    most = MOST_SAMPLES
    while True:
        shown = select(list(first.values()), owners, most)
        shares = _shares(first.values(), shown, owners)
        shared = _shared_beginnings(shown)
        for clip, drafts in CLIPS:
            values = {
                "runs": [{"mark": run.mark, "name": run.name} for run in runs],
                "gates": list(RULES),
                "tasks": [
                    {"name": name, "owner": owners[name], "shared": clipped(text, CLIPS[0][0])}
                    for name, text in shared.items()
                ],
                "samples": [_sample(documents[r["key"]], r, shared, clip, drafts) for r in shown],
            }
            text = safe_json(values)
            if len(text.encode()) <= PAGE_BYTES:
                return Block(text, clip, drafts, shares)
        if most == 1:
            return Block(text, clip, drafts, shares)
        most = max(1, most // 2)


def select(records: Sequence[Record], owners: Mapping[str, str], most: int) -> list[Record]:
    """The samples a page shows: all, or `most` of them, evenly spaced in file order and whatever their score.

    owners: leaf task -> task of the spec.  Each task of the spec (a group counts as one) gets an equal share, and
    passes on what it does not need. So right and wrong answers stand in a task's selection about as in the run.
    """
    if len(records) <= most:
        return list(records)
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(owners[record["task"]], []).append(record)
    room, keep = most, set()
    for place, group in enumerate(sorted(by_task.values(), key=len)):
        share = min(len(group), room // (len(by_task) - place))
        keep |= {id(group[i * len(group) // share]) for i in range(share)}
        room -= share
    return [record for record in records if id(record) in keep]


def pack(values: Iterable[int]) -> str:
    """Integers as text, small ones as one letter: base64 VLQ, the coding of source maps (ECMA-426)."""
    found = []
    for value in values:
        rest = value << 1 if value >= 0 else -value << 1 | 1
        while rest > 31:
            found.append(_DIGITS[rest & 31 | 32])
            rest >>= 5
        found.append(_DIGITS[rest])
    return "".join(found)


def _hit(record: Record) -> list[int]:
    """Numbers of the health gates that count this sample."""
    return [
        n for n, rule in enumerate(RULES.values()) if "lost" not in record and rule.asks(record) and rule.counts(record)
    ]


def _shares(
    records: Iterable[Record], shown: Sequence[Record], owners: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    ours = Counter(owners[record["task"]] for record in shown)
    everything = Counter(owners[record["task"]] for record in records)
    return {name: (ours[name], count) for name, count in everything.items()}


def _shared_beginnings(records: Sequence[Record]) -> dict[str, str]:
    """Leaf task -> the whole lines that all its prompts begin with; empty if they are few."""
    prompts: dict[str, list[str]] = {}
    for record in records:
        prompts.setdefault(record["task"], []).append(record["prompt"])
    found = {}
    for task, texts in prompts.items():
        # what the first and the last in order share, all between them share
        same = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  letters are meant
        same = same[: same.rfind("\n") + 1]
        found[task] = same if len(texts) > 1 and len(same) >= SHARED_LEAST else ""
    return found


def _sample(
    answers: Sequence[Record | None],
    first: Record,
    shared: Mapping[str, str],
    clip: int,
    drafts: bool,
) -> Nested:
    """A document and what each run answered (None: nothing). What is empty is left out."""
    task = first["task"]
    found = []
    for record in answers:
        answer = record and _answer(record, clip, drafts)
        if record and answer and record["prompt"] != first["prompt"]:
            answer["prompt"] = clipped(record["prompt"], clip)
        found.append(answer)
    values = {
        "key": first["key"],
        "task": list(shared).index(task),
        "prompt": clipped(first["prompt"][len(shared[task]) :], clip),
        "target": clipped(str(first.get("target") or ""), clip // 2),
        "choices": first.get("choices"),
        "answers": found,
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _answer(record: Record, clip: int, drafts: bool) -> Nested:
    trace = record.get("trace") or {}
    values = {
        **_written(record, clip, drafts),
        "promptTokens": record.get("prompt_tokens"),
        "cut": record.get("truncated") or None,
        "thinking": _THINKING[record.get("thinking_ended")],
        "tokens": len(record.get("output_ids") or []) or None,
        "finish": record.get("finish"),
        "extracted": {name: clipped(text, clip // 2) for name, text in (record.get("extracted") or {}).items()},
        "verdicts": [f"{told['result']} ({told['isolation']})" for told in record.get("verdicts") or []],
        "scores": {name: _finite(value) for name, value in (record.get("scores") or {}).items()},
        "forwards": {kind: count for kind, count in trace.get("forwards", {}).items() if count},
        "predicted": trace.get("predicted"),
        "accepted": trace.get("accepted"),
        "loglikelihoods": [_finite(value) for value in record.get("loglikelihoods") or []],
        "errors": [value if value is None else _finite(value) for value in record.get("standard_errors") or []],
        "gates": _hit(record),
        "lost": record.get("lost"),
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _written(record: Record, clip: int, drafts: bool) -> Nested:
    """The answer's text and, where the run recorded them, its tokens.

    text: all that was written, or [its beginning, letters left out, its end], cut between tokens.  span: the part of
    it that counts as the answer, from letter to letter; `output` is that part where it is none of the text.
    lengths: of the tokens kept, packed.  skip: [place of the first token left out, how many].  written: the forward of
    each token, as packed differences.  rejected: [forward, place, tokens, text] each.
    Letters are UTF-16 units, as a browser counts.
    """
    pieces, trace, output = record.get("pieces"), record.get("trace") or {}, record["output"]
    if pieces is None or len(pieces) != len(trace.get("written") or []):
        raw = record.get("raw_output")
        return {"output": clipped(output, clip), "raw": clipped(raw, clip) if raw else None}
    whole = "".join(pieces)
    thought = record.get("thinking_ended") is not None  # then the answer is what comes last, else what comes first
    start = whole.rfind(output) if thought else whole.find(output)
    sizes = [_units(piece) for piece in pieces]
    ends = list(accumulate(sizes, initial=0))
    head = sum(end <= clip // 2 for end in ends[1:])
    tail = len(pieces) - sum(ends[-1] - end <= clip // 2 for end in ends[:-1])
    text: str | list[str | int] = whole
    if skipped := ends[-1] > clip:
        text = ["".join(pieces[:head]), ends[tail] - ends[head], "".join(pieces[tail:])]
        sizes = sizes[:head] + sizes[tail:]
    rejected = [
        [forward, place, len(ids), said[: clip // 10]]
        for (forward, place, ids), said in zip(trace.get("rejected") or [], record.get("rejected") or [], strict=False)
    ]
    return {
        "text": text,
        "span": [_units(whole[:start]), _units(whole[: start + len(output)])] if start >= 0 else None,
        "output": None if start >= 0 else clipped(output, clip),
        "lengths": pack(sizes),
        "skip": [head, tail - head] if skipped else None,
        "written": pack(after - before for before, after in pairwise([0, *trace["written"]])),
        "rejected": rejected if drafts else None,
    }


def clipped(text: str, most: int) -> str | list[str | int]:
    """A text, or [its beginning, how many characters are left out, its end] if it has more than `most`."""
    if len(text) <= most:
        return text
    half = most // 2
    return [text[:half], len(text) - 2 * half, text[-half:]]


def safe_json(values: Any) -> str:
    """JSON that ends no <script> and opens no comment: what HTML or JavaScript could read is escaped."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _finite(value: float) -> float | str:
    """A number with five digits after the point, or its name where JSON has none."""
    return round(value, 5) if math.isfinite(value) else str(value)
