"""Prompts that benches share: the mini suite's test questions, and real GSM8K where the folder is there."""

from __future__ import annotations

import gzip
import importlib.util
import json
from itertools import chain, islice
from pathlib import Path
from types import ModuleType

LEVELS = (1, 2, 3)
WRITTEN = ("mini_gsm8k", "mini_math", "mini_humaneval")
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def mini(count: int) -> list[str]:
    """Word problems of the mini suite's test set, the levels taking turns."""
    suite = _suite()
    rows = chain.from_iterable(zip(*(suite.test_rows("mini_gsm8k", level) for level in LEVELS), strict=True))
    return [row["prompt"] for row in islice(rows, count)]


def all_written() -> list[str]:
    """All questions of the mini suite whose answers are written."""
    suite = _suite()
    return [row["prompt"] for task in WRITTEN for level in LEVELS for row in suite.test_rows(task, level)]


def real(count: int) -> list[str]:
    """GSM8K test questions; none where there is no data beside the checkout."""
    return [f"Question: {row['question']}\nAnswer:" for row in _test_rows("gsm8k", count)]


def human_eval(count: int) -> list[str]:
    """HumanEval's prompts; none where there is no data beside the checkout."""
    return [row["prompt"] for row in _test_rows("humaneval", count)]


def _test_rows(benchmark: str, count: int) -> list[dict[str, str]]:
    for file in sorted((DATA / benchmark).glob("test.jsonl*")):
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, count)]
    return []


def _suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mini_suite", ROOT / "tasks" / "mini" / "suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
