"""Data of any lm-eval task from a folder. The files hold the dataset's own fields, a row a line.

    dataset_path google-research-datasets/mbpp   dataset_name full     DIR/mbpp/full/test.jsonl
    dataset_path Rowan/hellaswag                                       DIR/hellaswag/validation.jsonl
    dataset_path openai/gsm8k                    dataset_name main     DIR/gsm8k/test.jsonl

`main` and `default` name no folder. DIR/OWNER/DATASET/… is looked at first, for owners whose datasets share a name.
Each file may be gzipped (.jsonl.gz). DIR is the run's data folder, then the folder of the user's own tasks. A data
folder that lacks a file is an error, not a reason to ask the hub.

lm-eval has no place for this: its tasks call `datasets.load_dataset`. That is replaced for the life of the process, and
answers as before outside of `from_folders`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from fluid_model.common.errors import ConfigError, reason
from fluid_model.common.files import parse_json, read_lines

from .datasets import Row, note

SUFFIXES = (".jsonl", ".jsonl.gz")
UNNAMED = (None, "", "main", "default")
"""Names of configurations that have no folder of their own."""
BUILDERS = ("json", "csv", "parquet", "text", "arrow", "pandas")
"""Values of dataset_path that read the files which a task names itself."""
Splits = Callable[[str, str | None], Sequence[str]]
"""The splits that tasks need of a dataset (path, configuration), for an error that names files."""


@dataclass(frozen=True)
class _Folders:
    """data_dir: of the run, also the owner of what is read.  own: of the user's tasks."""

    data_dir: str | None
    own: str | None
    splits: Splits


_current: list[_Folders] = []
"""The folders in use, the last one counts. Global, since lm-eval's tasks call a function of a library."""
_library_load = datasets.load_dataset


@contextmanager
def from_folders(data_dir: str | None, own: str | None, splits: Splits) -> Iterator[None]:
    """Within it, datasets of tasks come from these folders where they lie there. own: the user's task folder."""
    datasets.load_dataset = _load
    _current.append(_Folders(data_dir, own, splits))
    try:
        yield
    finally:
        _current.pop()


class LocalSplits(datasets.DatasetDict):
    """Splits of a folder. One that is missing is a ConfigError naming its file."""

    def __init__(self, place: Path, label: str, splits: dict[str, datasets.Dataset]) -> None:
        super().__init__(splits)
        self._place = place
        self._label = label

    def __missing__(self, split: str) -> datasets.Dataset:
        raise ConfigError(
            f"{self._place / str(split)}.jsonl: no such file (nor .jsonl.gz); it is to hold the split {split} of "
            f"{self._label}, a row a line"
        )


def places(folder: str, path: str, name: str | None) -> list[Path]:
    """Where a dataset may lie in a folder, first the one that names its owner."""
    inner = [] if name in UNNAMED else [str(name)]
    return [Path(folder, one, *inner) for one in dict.fromkeys((path, path.rpartition("/")[2]))]


def _load(path: str, name: str | None = None, *args: Any, split: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset`, but for datasets that lie in the current folders."""
    if not _current or path in BUILDERS or Path(path).exists():
        return _library_load(path, name, *args, split=split, **options)
    folders = _current[-1]
    # 1) the folders
    label = f"{path} ({name})" if name else path
    for folder in filter(None, (folders.data_dir, folders.own)):
        for place in places(folder, path, name):
            if files := [file for suffix in SUFFIXES for file in sorted(place.glob(f"*{suffix}"))]:
                return _read(files, label, folders.data_dir, split)
    if folders.data_dir is not None:
        missing = LocalSplits(places(folders.data_dir, path, name)[-1], label, {})
        return missing if split is None else missing[split]
    # 2) the hub
    try:
        return _library_load(path, name, *args, split=split, **options)
    except Exception as error:  # the hub's clients raise many types
        beside = "" if folders.own is None else f"put {_files(folders.own, path, name)} there, or "
        raise ConfigError(
            f"no data for {label}: the hub gave {type(error).__name__}. Connect to it, or {beside}pass --data-dir DIR "
            f"(or set FLUID_DATA_DIR) with {_files('DIR', path, name)}"
        ) from error


def _files(folder: str, path: str, name: str | None) -> str:
    """The files of a folder that would hold the splits which tasks need of a dataset."""
    place = places(folder, path, name)[-1]
    return ", ".join(f"{place / one}.jsonl" for one in _current[-1].splits(path, name) or ["SPLIT"])


def _read(files: Sequence[Path], label: str, owner: str | None, split: str | None) -> Any:
    """The splits of these files, fingerprinted; one alone if `split` names it."""
    splits = {}
    for file in files:
        name = file.name.partition(".")[0]
        if name not in splits and split in (None, name):
            rows = _rows(file)
            note(label, name, owner, rows)
            splits[name] = _table(rows, file)
    local = LocalSplits(files[0].parent, label, splits)
    return local if split is None else local[split]


def _rows(file: Path) -> list[Row]:
    """Rows of a JSON lines file. Raises ConfigError naming the line that is no object."""
    rows = []
    for number, line in read_lines(file):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {number}: no object with a row's fields")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{file}: holds no rows")
    return rows


def _table(rows: Sequence[Row], file: Path) -> datasets.Dataset:
    """Rows as lm-eval takes them; a field that a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, TypeError) as error:  # pyarrow's errors are of these kinds
        raise ConfigError(f"{file}: a field has values of several types ({reason(error)})") from error
