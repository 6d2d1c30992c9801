"""Which files hold a log, and of which harness: by their fields, whatever their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fluid_model.common import files
from fluid_model.common.errors import ConfigError

from . import evalscope_files, human_eval_files, inspect_files, lm_eval_files
from .logs import ForeignLog

Reader = Callable[[Path], ForeignLog]
KNOWN = (
    "lm-eval's samples_*.jsonl, EvalScope's reviews or predictions, inspect_ai's .json or .eval, "
    "human-eval's task_id and completion"
)
"""The known formats, for messages."""
_LINES: tuple[tuple[set[str], Reader], ...] = (
    (lm_eval_files.ROW, lm_eval_files.read),
    (evalscope_files.REVIEW, evalscope_files.read),
    (evalscope_files.PREDICTION, evalscope_files.read),
    (human_eval_files.ROW, human_eval_files.read),
)
"""Fields of a line -> reader of its file."""


def find(paths: Iterable[Path]) -> list[ForeignLog]:
    """All logs of these files and folders. Raises ConfigError where a path holds none, or a line cannot be read."""
    logs: dict[Path, ForeignLog] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        readers = _in_folder(path) if path.is_dir() else _of_file(path)
        if not readers:
            raise ConfigError(f"{path}: no known log; known are {KNOWN}")
        logs |= {file: reader(file) for file, reader in readers.items() if file not in logs}
    return list(logs.values())


def _in_folder(folder: Path) -> dict[Path, Reader]:
    """Readers of the logs in a folder; of two files with the same answers, that with the scores."""
    readers: dict[Path, Reader] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("results_"):
            readers |= _of_file(file)
    for file in list(readers):
        judged = file.with_name(file.name + human_eval_files.RESULTS)
        is_prediction = file.parent.parent.name == "predictions"
        if judged in readers or (is_prediction and evalscope_files.reviews_of(file) in readers):
            del readers[file]
    return readers


def _of_file(file: Path) -> dict[Path, Reader]:
    """The reader of a file's log, by its path; that of each samples file for a results file; none for other files."""
    name = file.name.removesuffix(".gz")
    if name.endswith(".eval"):
        return {file: inspect_files.read}
    if name.endswith(".json"):
        keys = _keys(files.read_text(file))
        if keys >= inspect_files.HEADER:
            return {file: inspect_files.read}
        if keys >= {"results", "configs"}:
            return dict.fromkeys(lm_eval_files.samples_beside(file), lm_eval_files.read)
    if name.endswith(".jsonl"):
        first = next(files.read_lines(file), None)
        keys = _keys(first[1]) if first else set()
        fitting = [reader for fields, reader in _LINES if keys >= fields]
        return dict.fromkeys([file], fitting[0]) if fitting else {}
    return {}


def _keys(text: str) -> set[str]:
    """The fields of a JSON object; none for other text."""
    try:
        values = files.parse_json(text)
    except ValueError:
        return set()
    return set(values) if isinstance(values, dict) else set()
