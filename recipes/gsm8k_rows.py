"""GSM8K's training rows as tasks ask them: `python recipes/gsm8k_rows.py train.jsonl.gz build/gsm8k-train.jsonl`."""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Write one row a line: the question as the task's prompt, its answer with the calculator's marks left in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="openai/gsm8k, main, train, as JSON lines (.gz or not)")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    opened = gzip.open if options.source.suffix == ".gz" else open
    with opened(options.source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8") as out:
        for row in rows:
            line = {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{options.out}: {len(rows):,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
