"""Reading of finished runs: the result with its samples, checked against one another, or a data frame."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.tokens import encodable

from .run_folder import RESULT, SAMPLES, SPEC, read_samples
from .sample_records import Record, in_order
from .stored_values import read_result

if TYPE_CHECKING:
    import pandas


def read_finished(folder: Path, needed: Iterable[str] = (), *, shown: bool = False) -> tuple[Nested, list[Record]]:
    """A finished run's result, and its samples in task and document order.

    needed: fields that the result must have beside `members` and `lines`.  shown: see `read_result`.
    Raises ConfigError if the folder holds no finished run, its samples are not those of its result, or a score is not
    finite.
    """
    # 1) a finished run
    if not (folder / SPEC).is_file():
        raise ConfigError(f"{folder}: no run here (no {SPEC}); name the folder that fluid-eval run --out wrote")
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: this run is not finished (no {RESULT}); run it again with --resume first")
    result = read_result(folder / RESULT, {"members", "lines", *needed}, shown=shown)
    if not result["lines"] and not result.get("lost"):
        raise ConfigError(
            f"{folder}: its answers have no scores; fluid-eval rescore {folder} --profile lm-eval gives them"
        )
    # 2) samples of the result's tasks, as many as it counted
    task_of_leaf = {leaf: task for task, leaves in result["members"].items() for leaf in leaves}
    records = in_order(read_samples(folder), task_of_leaf)
    counts = Counter(task_of_leaf.get(record["task"]) for record in records)
    for line in result["lines"]:
        if counts[line["task"]] < line["n"]:
            raise ConfigError(
                f"{folder / SAMPLES}: {counts[line['task']]} samples of {line['task']}, the result has "
                f"{line['n']}; run it again into another --out"
            )
    if None in counts:
        raise ConfigError(f"{folder / SAMPLES}: holds samples of tasks that the result does not have")
    # 3) scores
    _check_scores(folder / SAMPLES, records)
    return result, records


def _check_scores(file: Path, records: Sequence[Record]) -> None:
    """Raise ConfigError unless each sample is scored, by finite numbers, those aside whose request failed."""
    for record in records:
        if "lost" not in record and "scores" not in record:
            raise ConfigError(f"{file}: {record['key']} has no score; run it again into another --out")
        for name, score in record.get("scores", {}).items():
            if not math.isfinite(score):
                raise ConfigError(
                    f"{file}: {record['key']} has the score {name}={score}; its metric is at fault: fix it, and run "
                    "again into another --out"
                )


def load_results(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """One row a sample of a run folder: its fields, each score as `score:NAME`, each count as `forwards:KIND`.

    Raises ConfigError if the folder holds no run or a line is damaged.
    """
    import pandas

    folder = Path(path)
    if not (folder / SPEC).is_file():
        raise ConfigError(f"{folder}: no run here (no {SPEC})")
    return pandas.DataFrame([_row(record) for record in read_samples(folder)])


def rows_frame(rows: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """Rows of named values as a data frame."""
    import pandas

    return pandas.DataFrame(list(rows))


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as flat columns."""
    row = {name: value for name, value in record.items() if name not in ("scores", "trace")}
    for name, value in row.items():
        if isinstance(value, str):
            row[name] = encodable(value)  # Arrow refuses lone surrogates
    trace = record.get("trace") or {}
    row |= {f"score:{name}": value for name, value in (record.get("scores") or {}).items()}
    row |= {f"forwards:{kind}": count for kind, count in (trace.get("forwards") or {}).items()}
    row |= {name: trace.get(name) for name in ("slots", "predicted", "accepted")}
    return row
