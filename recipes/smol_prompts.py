"""Prompts for smol-fluid: GSM8K's training questions, in random order.

python recipes/smol_prompts.py DATA build/smol-prompts.jsonl, with DATA laid out as in docs/tasks.md. Three of four are
written as the task asks them ("Question: ...\\nAnswer:"), the fourth as the question alone. Questions that are a test
row of GSM8K or MATH500 are left out, and so are the prompts of HumanEval.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = {"gsm8k": "question", "math500": "problem", "humaneval": "prompt", "mmlu": "question"}
"""Benchmarks and the field of their test rows that no training prompt may equal."""


def main(arguments: list[str] | None = None) -> int:
    """Write one prompt a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    # 1) hashes of all test questions
    tested = set()
    for name, field in TESTS.items():
        tested |= {_hash(row[field]) for row in _rows(options.data / name / "test.jsonl")}
    # 2) training rows whose questions are none of them
    everything = list(_rows(options.data / "gsm8k" / "train.jsonl"))
    rows = [row for row in everything if _hash(row["question"]) not in tested]
    random.Random(1).shuffle(rows)
    # 3) one prompt a line
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        for number, row in enumerate(rows):
            prompt = row["question"] if number % 4 == 3 else f"Question: {row['question']}\nAnswer:"
            out.write(json.dumps({"prompt": prompt, "completion": f" {row['answer']}"}, ensure_ascii=False) + "\n")
    left_out = len(everything) - len(rows)
    print(f"{options.out}: {len(rows):,} prompts; {left_out} left out, which are test rows ({len(tested):,} hashes)")
    return 0


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped if only its .gz exists."""
    packed = file.with_name(f"{file.name}.gz")
    opened = open if file.is_file() else gzip.open
    with opened(file if file.is_file() else packed, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _hash(text: str) -> str:
    """Of the text's words, so that spacing and case do not tell two copies apart."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
