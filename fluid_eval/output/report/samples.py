"""The samples of a page, as JSON that is safe inside HTML and small enough to search in a browser.

A document's prompt is stored once, with the answer of each run. An answer's tokens are its text, the tokens' lengths
and the forwards that wrote them, packed to about two letters a token:

    {"key": "mini_gsm8k_1/0", "task": 0, "prompt": "Question: ..", "answers": [
        {"text": " He has 11 plates.", "lengths": "GIGEQ", "written": "CCAAC", "finish": "eos", ..}, null]}
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
from ...results.sample_records import tokens_of
from .runs import Nested, ReportRun

MOST_SAMPLES = 2000
"""Documents of a page at most; a browser searches that many without a pause."""
PAGE_BYTES = 4_600_000
"""Bytes of samples in a page of 5 MB; above that, texts are cut shorter."""
CLIPS = ((6000, True), (6000, False), (3000, False), (1500, False), (750, False))
"""Characters of a text (its middle is left out), and whether rejected draft tokens are included. The first pair that
fits PAGE_BYTES is used."""
SHARED_LEAST = 200
"""Least length of a prefix shared by all prompts of a task (few-shot examples) to be stored only once."""
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_THINKING = {True: "ended", False: "never ended", None: None}
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Block:
    """The samples of a page. clip: characters of a text at most.  drafts: whether rejected draft tokens are included.

    shares: task of the spec -> (documents shown, all documents).
    """

    json: str
    clip: int
    drafts: bool
    shares: Mapping[str, tuple[int, int]]


def block(runs: Sequence[ReportRun]) -> Block:
    """Samples of these runs by document, in the first run's order, as many and as long as a page may hold."""
    # 1) answers of all runs, by document
    documents: dict[str, list[Record | None]] = {}
    owners = {leaf: task for run in reversed(runs) for leaf, task in run.owners.items()}
    for place, run in enumerate(runs):
        for record in run.records:
            documents.setdefault(record["key"], [None] * len(runs))[place] = record
    first = {key: next(record for record in answers if record) for key, answers in documents.items()}
    # 2) fewer characters, then fewer documents, until they fit
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
    """The samples a page shows: all, or `most` of them, evenly spaced in file order whatever their score.

    owners: leaf task -> task of the spec. Each task of the spec (a group counts as one) gets an equal share; unused
    places go to larger tasks. A selection has about the same accuracy as the run.
    """
    if len(records) <= most:
        return list(records)
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(owners[record["task"]], []).append(record)
    room, chosen = most, set()
    for place, group in enumerate(sorted(by_task.values(), key=len)):
        share = min(len(group), room // (len(by_task) - place))
        chosen |= {id(group[i * len(group) // share]) for i in range(share)}
        room -= share
    return [record for record in records if id(record) in chosen]


def pack(values: Iterable[int]) -> str:
    """Integers as text, small ones as one letter: base64 VLQ, the coding of source maps (ECMA-426)."""
    letters = []
    for value in values:
        rest = value << 1 if value >= 0 else -value << 1 | 1
        while rest > 31:
            letters.append(_DIGITS[rest & 31 | 32])
            rest >>= 5
        letters.append(_DIGITS[rest])
    return "".join(letters)


def _gates_hit(record: Record) -> list[int]:
    """Numbers of the health gates that count this sample."""
    return [
        n
        for n, rule in enumerate(RULES.values())
        if "lost" not in record and rule.applies(record) and rule.is_faulty(record)
    ]


def _shares(
    records: Iterable[Record], shown: Sequence[Record], owners: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Task of the spec -> (documents shown, all documents)."""
    ours = Counter(owners[record["task"]] for record in shown)
    everything = Counter(owners[record["task"]] for record in records)
    return {name: (ours[name], count) for name, count in everything.items()}


def _shared_beginnings(records: Sequence[Record]) -> dict[str, str]:
    """Leaf task -> lines that all its prompts begin with; empty if they are short."""
    prompts: dict[str, list[str]] = {}
    for record in records:
        prompts.setdefault(record["task"], []).append(record["prompt"])
    prefixes = {}
    for task, texts in prompts.items():
        # a prefix of the first and the last in order is a prefix of all between them
        same = os.path.commonprefix([min(texts), max(texts)])  # noqa: RUF071  letters are meant
        same = same[: same.rfind("\n") + 1]
        prefixes[task] = same if len(texts) > 1 and len(same) >= SHARED_LEAST else ""
    return prefixes


def _sample(
    answers: Sequence[Record | None],
    first: Record,
    shared: Mapping[str, str],
    clip: int,
    drafts: bool,
) -> Nested:
    """A document and each run's answer, None where it has none. Empty fields are left out."""
    task = first["task"]
    run_answers = []
    for record in answers:
        answer = record and _answer(record, clip, drafts)
        if record and answer and record["prompt"] != first["prompt"]:
            answer["prompt"] = clipped(record["prompt"], clip)
        run_answers.append(answer)
    values = {
        "key": first["key"],
        "task": list(shared).index(task),
        "prompt": clipped(first["prompt"][len(shared[task]) :], clip),
        "target": clipped(str(first.get("target") or ""), clip // 2),
        "choices": first.get("choices"),
        "answers": run_answers,
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _answer(record: Record, clip: int, drafts: bool) -> Nested:
    """One run's answer. Empty fields are left out."""
    trace = record.get("trace") or {}
    values = {
        **_written(record, clip, drafts),
        "promptTokens": record.get("prompt_tokens"),
        "cut": record.get("truncated") or None,
        "thinking": _THINKING[record.get("thinking_ended")],
        "tokens": tokens_of(record) or None,
        "finish": record.get("finish"),
        "extracted": {name: clipped(text, clip // 2) for name, text in (record.get("extracted") or {}).items()},
        "verdicts": [f"{test['result']} ({test['isolation']})" for test in record.get("verdicts") or []],
        "scores": {name: _finite(value) for name, value in (record.get("scores") or {}).items()},
        "forwards": {kind: count for kind, count in (trace.get("forwards") or {}).items() if count},
        "predicted": trace.get("predicted"),
        "accepted": trace.get("accepted"),
        "loglikelihoods": [_finite(value) for value in record.get("loglikelihoods") or []],
        "errors": [value if value is None else _finite(value) for value in record.get("standard_errors") or []],
        "gates": _gates_hit(record),
        "lost": record.get("lost"),
    }
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def _written(record: Record, clip: int, drafts: bool) -> Nested:
    """The answer's text and, where the run recorded them, its tokens.

    text: all generated text, or [its beginning, letters left out, its end], cut between tokens.
    span: [start, end] of the part of it that counts as the answer; `output` is that part if the text does not hold it.
    lengths: of the tokens shown, packed.  skip: [place of the first token left out, how many].
    written: the forward of each token, as packed differences.  rejected: [forward, place, tokens, text] each.
    Letters are UTF-16 units, as a browser counts.
    """
    pieces, trace, output = record.get("pieces"), record.get("trace") or {}, record["output"]
    if pieces is None or len(pieces) != len(trace.get("written") or []):
        raw = record.get("raw_output")
        return {"output": clipped(output, clip), "raw": clipped(raw, clip) if raw else None}
    # 1) the part of the text that counts as the answer
    everything = "".join(pieces)
    has_thinking = record.get("thinking_ended") is not None  # then the answer comes last
    start = everything.rfind(output) if has_thinking else everything.find(output)
    # 2) tokens shown: those of the beginning and the end, if the text is too long
    sizes = [_units(piece) for piece in pieces]
    ends = list(accumulate(sizes, initial=0))
    head = sum(end <= clip // 2 for end in ends[1:])
    tail = len(pieces) - sum(ends[-1] - end <= clip // 2 for end in ends[:-1])
    text: str | list[str | int] = everything
    if skipped := ends[-1] > clip:
        text = ["".join(pieces[:head]), ends[tail] - ends[head], "".join(pieces[tail:])]
        sizes = sizes[:head] + sizes[tail:]
    # 3) rejected draft tokens
    texts = record.get("rejected") or []
    rejected = [
        [forward, place, len(ids), draft[: clip // 10]]
        for (forward, place, ids), draft in zip(trace.get("rejected") or [], texts, strict=False)
    ]
    return {
        "text": text,
        "span": [_units(everything[:start]), _units(everything[: start + len(output)])] if start >= 0 else None,
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
    """JSON without any character that ends a <script>, opens a comment or breaks a JavaScript string."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _finite(value: float) -> float | str:
    """A number with five digits after the point, or its name where JSON has none."""
    return round(value, 5) if math.isfinite(value) else str(value)
