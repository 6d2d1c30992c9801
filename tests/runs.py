"""Made-up finished runs, as folders: answers say which forward wrote which token, and one attacks the page."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluid_eval.common.spec import HealthSpec, build_spec
from fluid_eval.results.health import gates
from fluid_eval.results.metrics import table_rows
from fluid_eval.results.run_folder import encode, write_json

HOSTILE = (
    "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "<!-- <script> \u2028 &lt; <b onmouseover=alert(1)> javascript:alert(1)"
)
HALF = "\ud800"
"""Half a character, as byte-level models can write it: no encoding has it."""
SHARED = "Question: a worked example\nAnswer: as it should be\n" * 9
KINDS = {"ar": "commit", "fluid": "round", "llada": "denoise"}
WRITTEN, SCORED = 30, 12
"""Documents of each task."""


def forwards_of(decoder: str, tokens: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """The forward of each token, and the stride of each round: one at a time, in sprints, or all over the canvas."""
    if decoder == "ar":
        return list(range(1, tokens + 1)), []
    widths: list[int] = []
    while sum(widths) < tokens:
        widths.append(min(tokens - sum(widths), rng.choice((1, 1, 2, 3, 5, 8, 13))))
    first = 1 if decoder == "llada" else 2
    written = [forward for forward, width in enumerate(widths, first) for _ in range(width)]
    if decoder == "llada":
        rng.shuffle(written)
        return written, []
    return written, widths


def answer(pieces: Sequence[str], decoder: str, rng: random.Random) -> dict[str, Any]:
    """Fields of a sample whose answer is these pieces; a FLUID's rounds reject drafts now and then."""
    written, widths = forwards_of(decoder, len(pieces), rng)
    prefill = int(decoder == "fluid")
    rejected, rejected_texts = [], []
    for place, forward in enumerate(written):
        if widths and place and written[place - 1] != forward and rng.random() < 0.3:
            rejected.append([written[place - 1], place, list(range(rng.randint(1, 5)))])
            rejected_texts.append("".join(f" no{n}" for n in rejected[-1][2]))
    kinds = dict.fromkeys(("prefill", "denoise", "verify", "commit", "round"), 0)
    return {
        "output": "".join(pieces), "output_ids": list(range(len(pieces))), "pieces": list(pieces),
        "rejected": rejected_texts, "finish": "eos", "seconds": len(widths or pieces) / 1000,
        "trace": {
            "forwards": kinds | {"prefill": prefill, KINDS[decoder]: max(written, default=1) - prefill},
            "slots": 4 * len(pieces), "written": written, "rejected": rejected,
            "predicted": [width + rng.randint(0, 2) for width in widths], "accepted": widths,
        },
    }  # fmt: skip


def written(n: int, decoder: str, rng: random.Random, text: str | None = None) -> dict[str, Any]:
    """An answer to question n: the first is hostile, some hit the limit or are empty, one prompt was cut."""
    if text is None:
        more = " Then nothing more comes to it, and nothing 😀 goes away." * (n % 4)
        text = (
            HOSTILE if n == 0 else f" First {n} of them, and {n} of the others: both make\n{2 * n}.{more}\n#### {2 * n}"
        )
    pieces = [] if n == 7 else re.findall(r"\s*\w{1,4}|\s*[^\w\s]|\s+", text)
    thought = ["<think>", *pieces, "</think>"] * (n == 5)  # what is thought is no part of the answer either
    end = ["</s>", *(pieces if n == 6 else [])] * (n % 3 == 0)  # a stop string, which is no part of the answer
    return {
        **({"thinking_ended": True} if thought else {}),
        "key": f"gsm8k/{n}", "task": "gsm8k", "doc_id": n, "prompt_hash": f"{n:016}",
        "prompt": f"{SHARED}Question: number {n}{HALF * (n == 2)}\nAnswer:",
        "prompt_tokens": 90, "truncated": 7 * (n == 1), **answer([*thought, *pieces, *end], decoder, rng),
        "output": "".join(pieces), "finish": "length" if n % 10 == 3 else "stop",
        "extracted": {"strict-match": "[invalid]" if n == 7 else str(n), "flexible-extract": HOSTILE},
        "scores": {
            "exact_match,strict-match": float(rng.random() < {"ar": 0.8, "fluid": 0.7, "llada": 0.3}[decoder]),
            "exact_match,flexible-extract": 1.0,
        },
        "target": f"#### {n}",
    }  # fmt: skip


def scored(n: int, rng: random.Random) -> dict[str, Any]:
    """A question of four choices."""
    return {
        "key": f"mmlu_anatomy/{n}", "task": "mmlu_anatomy", "doc_id": n, "prompt_hash": f"{n:016}",
        "prompt": f"Which?\nA. {n}\nAnswer:", "prompt_tokens": 9, "truncated": 0,
        "trace": {"forwards": {"prefill": 2}, "slots": 20, "predicted": [], "accepted": []}, "seconds": 0.02,
        "output": "B", "output_ids": [], "finish": None, "choices": [" A", " B"],
        "loglikelihoods": [-float("inf"), -rng.random()], "greedy": [False, True],
        "extracted": {"none": "B"}, "scores": {"acc,none": float(n % 2)}, "target": "AB"[n % 2],
    }  # fmt: skip


def write_run(
    folder: Path, decoder: str = "fluid", *, model: str = "models/FLUID <b>7B", records: list[Any] | None = None
) -> Path:
    """A finished run: 30 answers of gsm8k, 12 scored questions of one mmlu subject; or `records` of gsm8k."""
    rng = random.Random(decoder)
    folder.mkdir(parents=True)
    spec = build_spec({"tasks": ["gsm8k", "mmlu"], "model": model, "decoder": decoder, "limit": 30})
    one = [written(n, decoder, rng) for n in range(WRITTEN)] if records is None else records
    other = [scored(n, rng) for n in range(SCORED)]
    members = {"gsm8k": ["gsm8k"], "mmlu": ["mmlu_anatomy"]}
    write_json(folder / "spec.json", {"id": spec.id, **spec.to_dict()})
    write_json(folder / "environment.json", {"versions": {"torch": "2.13.0"}, "git": {"commit": "abc", "dirty": True}})
    (folder / "samples.jsonl").write_bytes(b"".join(map(encode, [*one, *other])))
    result = {
        "spec_id": spec.id, "model": spec.model.path, "decoder": spec.to_dict()["decoder"],
        "started": "2026-11-21T03:40:03+00:00", "wall_seconds": 75.2,
        "lines": [line.to_dict() for line in [*table_rows("gsm8k", one), *table_rows("mmlu", other)]],
        "members": members, "parts": [line.to_dict() for line in table_rows("mmlu_anatomy", other)],
        "health": [gate.to_dict() for gate in gates([*one, *other], members, HealthSpec())],
        "data": ["matches the canonical MMLU test set (14042 rows)", "WARNING: 3 rows that are not canonical"],
        "notices": ["the last line was <i>cut</i> short"],
        "chat": {"template": "872be49dbb63", "system": None},
        "protocol": {
            "name": "lm-eval", "hash": "0123456789ab",
            "tasks": {"gsm8k": {"num_fewshot": 5, "until": ["\n\n", "</s>"], "extractors": {"strict-match": "#### n"}}},
        },
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return folder
