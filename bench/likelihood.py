"""MMLU by likelihood, 5 shots, side by side with lm-eval's `hf` backend.

python -m bench.likelihood [--model NAME] [--json] [--quick]

The same prompts, model and machine; every question is four choices after one context. Needs MMLU in a folder named
shared beside the checkout.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import fluid_model
from fluid_eval.analysis.losslessness import in_float64
from fluid_model import Checkpoint, Scorer, ScoreRequest

from . import bars
from .bars import Bar
from .clock import side_by_side
from .decode import TINY, lm_eval_hf

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmlu"
SUBJECTS = ("abstract_algebra", "anatomy", "management", "philosophy", "world_religions")
"""Whose five shots and questions fit tiny-fluid's window."""
LETTERS = (" A", " B", " C", " D")
BATCH = 16


def questions(each: int) -> list[str]:
    """Contexts: a subject's five dev rows with their answers, then one of its first test questions."""
    shots, asked = _rows("dev"), _rows("test")
    contexts = []
    for subject in SUBJECTS:
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        examples = [_ask(row) + LETTERS[int(row["answer"])] for row in shots if row["subject"] == subject]
        rows = [row for row in asked if row["subject"] == subject][:each]
        contexts += ["\n\n".join([head.rstrip("\n"), *examples, _ask(row)]) for row in rows]
    return contexts


def _ask(row: dict[str, Any]) -> str:
    choices = "\n".join(f"{letter.strip()}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}\nAnswer:"


def _rows(split: str) -> list[dict[str, Any]]:
    file = next(DATA.glob(f"{split}.jsonl*"))
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def ours(checkpoint: Checkpoint, contexts: list[str], scores: list[list[float]]) -> Callable[[], int]:
    """A call that scores all choices, keeps log-likelihoods in `scores` and returns how many questions there are."""

    def call() -> int:
        tokenizer = checkpoint.tokenizer
        texts = tokenizer([context + letter for context in contexts for letter in LETTERS])["input_ids"]
        heads = tokenizer(contexts)["input_ids"]
        asked = []
        for n, head in enumerate(heads):
            tails = [tuple(ids[len(head) :]) for ids in texts[4 * n : 4 * n + 4]]
            asked.append(ScoreRequest(str(n), tuple((tuple(head), tail) for tail in tails)))
        by_key = {score.key: score for score in Scorer(checkpoint.backbone, BATCH).score(asked)}
        scores[:] = [list(by_key[str(n)].loglikelihoods) for n in range(len(asked))]
        return len(asked)

    return call


def theirs(model: str, contexts: list[str], scores: list[list[float]]) -> Callable[[], int]:
    """The same by lm-eval's backend."""
    from lm_eval.api.instance import Instance

    backend = lm_eval_hf(model, BATCH)
    work = [
        Instance("loglikelihood", {}, (context, letter), 4 * n + i)
        for n, context in enumerate(contexts)
        for i, letter in enumerate(LETTERS)
    ]

    def call() -> int:
        flat = [value for value, _ in backend.loglikelihood(work, disable_tqdm=True)]
        scores[:] = [flat[start : start + 4] for start in range(0, len(flat), 4)]
        return len(contexts)

    return call


def apart(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest difference of two log-likelihoods."""
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    return max(abs(a - b) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.likelihood", description=__doc__)
    parser.add_argument("--model", default=str(TINY), help="a causal model: folder or GGUF file; default: tiny-fluid")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few questions, one run: whether it works")
    options = parser.parse_args(arguments)
    contexts = questions(2 if options.quick else 20)
    checkpoint = fluid_model.load(options.model, device="cpu", dtype="float32")
    mine: list[list[float]] = []
    other: list[list[float]] = []
    systems = {"ours": ours(checkpoint, contexts, mine), "hf": theirs(options.model, contexts, other)}
    speed = side_by_side(systems, 1 if options.quick else 5)
    print(f"questions/s: ours {speed['ours']:.1f}, lm-eval's hf backend {speed['hf']:.1f}", file=sys.stderr)
    exact: list[list[float]] = []
    ours(in_float64(fluid_model.load(options.model, device="cpu", dtype="float32")), contexts, exact)()
    wrong, theirs_wrong = apart(mine, exact), apart(other, exact)
    print(f"largest difference between the two: {apart(mine, other):.2g} nats", file=sys.stderr)
    results: list[Bar] = [
        bars.at_least(f"MMLU, 5 shots, {len(contexts)} questions: ours / lm-eval hf", speed.ratio("ours", "hf"), 3),
        Bar(
            "largest error of a log-likelihood against float64, nats: ours",
            float(f"{wrong:.2g}"),
            f"at most {theirs_wrong:.2g}, lm-eval hf's",
            wrong <= theirs_wrong,
        ),
    ]
    print(bars.render(results, as_json=options.json))
    return 0 if all(bar.ok is not False for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
