"""The run folder: what was asked, where it ran, every sample, and the result (written last). No torch, no lm-eval.

spec.json         the spec and its id
environment.json  versions, commit, hardware, data fingerprints
samples.jsonl     one line a sample with its checksum, appended as answers come; scores are filled in when the run ends
result.json       the table; a run without it is not finished

One process writes a folder at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fluid_model.common import files
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, bounded_lines, read_json
from fluid_model.tokens import encodable

from ..common.spec import RunSpec, build_spec
from .sample_records import Record as Record
from .sample_records import check_record, encode, in_order, parse
from .stored_values import read_environment, read_result

if TYPE_CHECKING:
    import pandas

SPEC, ENVIRONMENT, SAMPLES, RESULT = "spec.json", "environment.json", "samples.jsonl", "result.json"
AUDIT, KHEAD, REPEATS = "audit.json", "khead.json", "repeats.jsonl"
"""What `audit`, `khead` and `--speed-repeats` leave beside a run."""
RUN_FILES = (
    SPEC, ENVIRONMENT, SAMPLES, RESULT, AUDIT, KHEAD, REPEATS, "report.html", ".*.tmp"
)  # fmt: skip
"""What this package writes into a run folder; anything else there is the user's."""
POINTS, SWEEP = "points", "sweep.json"
"""Folder of a sweep that holds its runs, and the file that says which they are."""
_JUST_NOW = "another process wrote here just now, or removed it; try again with --resume"
_STEP = 1 << 20
"""Bytes read at a time, from a file's end."""


class Samples(Mapping[str, Record]):
    """Samples of a file by key, read where they stand: what memory holds of one is its key, place and prompt's hash."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: IO[bytes] | None = None
        self._places: dict[str, tuple[int, int, str]] = {}
        self.origin: tuple[int, int] | None = None
        """Which file the places are in: another one may bear its name by now."""

    def read(self, torn: int) -> Iterator[tuple[Record, int, int]]:
        """All samples with the place and size of their lines, but for the last `torn` bytes. None is noted yet."""
        with _opened(self._file) as handle:
            self.origin = _identity(handle)
            yield from _read(handle, self._file, torn)

    def note(self, record: Record, start: int, size: int) -> None:
        """A sample stands at these bytes of the file."""
        self._places[record["key"]] = start, size, record["prompt_hash"]

    def prompt_hash(self, key: str) -> str | None:
        """Of the prompt a sample answers, None without one."""
        return self._places[key][2] if key in self._places else None

    def __getitem__(self, key: str) -> Record:
        start, size, _ = self._places[key]
        if self._open is None:
            self._open = _opened(self._file)
            if _identity(self._open) != self.origin:
                raise ConfigError(f"{self._file.parent}: {_JUST_NOW}")
        self._open.seek(start)
        return parse(self._open.read(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class Run:
    """An open run folder: samples by key, and a way to append more."""

    def __init__(self, folder: Path, spec: RunSpec, *, resume: bool = False) -> None:
        """Check that the folder may be used; nothing is written yet (see `begin`).

        Raises ConfigError if it holds another spec, holds this one and `resume` is false, or cannot be written.
        """
        self.folder = folder
        self.spec = spec
        self.samples = Samples(folder / SAMPLES)
        self.notices: list[str] = []
        self._file: IO[bytes] | None = None
        self._torn = self._end = 0
        held = held_spec(folder)
        if held is None:
            _check_writable(folder)
        elif held.id != spec.id:
            raise ConfigError(f"{folder} holds another run ({_difference(held, spec)}); choose another --out")
        elif not resume:
            state = "a finished run" if (folder / RESULT).exists() else "a run that was not finished"
            raise ConfigError(f"{folder} holds {state} of this spec; pass --resume to go on, or another --out")
        else:
            if (folder / SAMPLES).exists():
                self._torn = torn_bytes(folder / SAMPLES)
                for record, start, size in self.samples.read(self._torn):
                    self._end = start + size
                    if "lost" not in record:  # what was given up is tried again
                        self.samples.note(record, start, size)
            if self.samples:
                self.notices.append(
                    f"{len(self.samples)} samples are from an earlier session; wall time is the last session's"
                )

    def begin(self, environment: Nested) -> None:
        """Create the folder and open the samples for appending. A last line that a crash cut short is dropped.

        Raises ConfigError if the run was begun where its answers may differ: other weights, device, dtype, versions; or
        if another process writes the folder.
        """
        self._check_same(environment)
        with _enough_room(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._mend_last_line()
            (self.folder / RESULT).unlink(missing_ok=True)  # it is not of all samples
            before = read_environment(self.folder / ENVIRONMENT)
            environment["sessions"] = 1 + (before.get("sessions", 1) if self.samples else 0)
            write_json(self.folder / SPEC, {"id": self.spec.id, **self.spec.to_dict()})
            write_json(self.folder / ENVIRONMENT, environment)

    def _hold(self) -> None:
        """Lock the samples for this process. Raises ConfigError if another has them, or has written since they were
        read: a run that ends puts another file in their place.
        """
        self._file = (self.folder / SAMPLES).open("ab", buffering=0)
        try:
            lock(self._file, self.folder)
            found, there = _identity(self._file), (self.folder / SAMPLES).stat()
            same = found == (there.st_dev, there.st_ino) and self.samples.origin in (None, found)
            if not same or self._file.tell() != self._end + self._torn:
                raise ConfigError(f"{self.folder}: {_JUST_NOW}")
            self.samples.origin = found
        except (ConfigError, OSError):
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Keep one sample: it is with the operating system before this returns.

        Raises RunError where the disk is full.
        """
        assert self._file is not None, "begin comes first"
        line = encode(record)
        with _enough_room(self.folder / SAMPLES):
            left = line
            while left:  # where little room is left, only some of it is written, and the next try says why
                left = left[self._file.write(left) :]
        self.samples.note(record, self._end, len(line))
        self._end += len(line)

    def finish(self, records: Iterable[Record], result: Nested) -> None:
        """Replace the samples by their scored form, then write the result."""
        draft = self.folder / f".{SAMPLES}.tmp"
        with _enough_room(draft):
            if self._file is None:  # nothing was missing, and so nothing begun
                self._hold()
            with draft.open("wb") as file:
                lock(file, self.folder)  # held until the result is there: it is the samples' file from here on
                file.writelines(encode(record) for record in records)
                file.flush()
                os.replace(draft, self.folder / SAMPLES)
                write_json(self.folder / RESULT, result)
        self.close()

    def close(self) -> None:
        """Close the samples file; a run left like this can be resumed."""
        self.samples.close()
        if self._file is not None:
            self._file.close()

    def _check_same(self, environment: Nested) -> None:
        file = self.folder / ENVIRONMENT
        if not self.samples:
            return
        before, now = (values.get("same", {}) for values in (read_environment(file), environment))
        for name in now:
            if name in before and before[name] != now[name]:
                raise ConfigError(
                    f"{self.folder} was begun with {name} {before[name]}, here it is {now[name]}; answers of both in "
                    "one table would mislead: choose another --out"
                )

    def _mend_last_line(self) -> None:
        if self._torn:
            file = self.folder / SAMPLES
            os.truncate(file, file.stat().st_size - self._torn)
            self.notices.append(f"{file}: the last line was cut short; dropped {self._torn} bytes")
            self._torn = 0


def torn_bytes(file: Path) -> int:
    """Bytes after the last newline: what a crash left of a line."""
    if not file.exists():
        return 0
    with _opened(file) as handle:
        size = start = handle.seek(0, os.SEEK_END)
        while start > 0:
            start = max(0, start - _STEP)
            handle.seek(start)
            if (last := handle.read(_STEP).rfind(b"\n")) >= 0:
                return size - (start + last + 1)
        return size


def read_samples(folder: Path, *, torn: int = 0) -> Iterator[Record]:
    """Samples of a run folder, in file order, all but the last `torn` bytes.

    Raises ConfigError naming file and line of one that is no sample.
    """
    if (folder / SAMPLES).exists():
        with _opened(folder / SAMPLES) as handle:
            for record, _, _ in _read(handle, folder / SAMPLES, torn):
                yield record


def read_finished(folder: Path, needed: Iterable[str] = (), *, shown: bool = False) -> tuple[Nested, list[Record]]:
    """A finished run's result and its samples in task and document order. needed: what its result must tell, `members`
    and `lines` in any case.  shown: see `read_result`.

    Raises ConfigError if the folder holds no finished run, the samples are not those of its result, or one's score is
    no finite number.
    """
    for name, what in (
        (SPEC, "no run here (no {}); name the folder that fluid-eval run --out wrote"),
        (RESULT, "this run is not finished (no {}); run it again with --resume first"),
    ):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: {what.format(name)}")
    result = read_result(folder / RESULT, {"members", "lines", *needed}, shown=shown)
    owners = {leaf: task for task, leaves in result["members"].items() for leaf in leaves}
    records = in_order(read_samples(folder), owners)
    counts = Counter(owners.get(record["task"]) for record in records)
    for line in result["lines"]:
        if counts[line["task"]] < line["n"]:
            raise ConfigError(
                f"{folder / SAMPLES}: {counts[line['task']]} samples of {line['task']}, the result has "
                f"{line['n']}; run it again into another --out"
            )
    if None in counts:
        raise ConfigError(f"{folder / SAMPLES}: holds samples of tasks that the result does not have")
    for record in records:
        if "lost" not in record and not record.get("scores"):
            raise ConfigError(f"{folder / SAMPLES}: {record['key']} has no score; run it again into another --out")
        for name, score in record.get("scores", {}).items():
            if not math.isfinite(score):
                raise ConfigError(
                    f"{folder / SAMPLES}: {record['key']} has the score {name}={score}; its metric is at fault: mend "
                    "it, and run again into another --out"
                )
    return result, records


def _read(handle: IO[bytes], file: Path, torn: int) -> Iterator[tuple[Record, int, int]]:
    """Samples with the place and size of their lines.  file: for messages."""
    end, start = os.fstat(handle.fileno()).st_size - torn, 0
    for number, line in bounded_lines(handle, file):
        if start >= end:
            return
        try:
            record = parse(line)
            check_record(record)
        except ValueError as error:
            raise ConfigError(
                f"{file}, line {number}: not a sample ({error}); without that line, --resume writes it again"
            ) from error
        yield record, start, len(line)
        start += len(line)


def _opened(file: Path) -> IO[bytes]:
    """Open for reading. Raises ConfigError where that cannot be."""
    try:
        return file.open("rb")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def _identity(file: IO[bytes]) -> tuple[int, int]:
    """What tells an open file from another one of its name."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def lock(file: IO[bytes], folder: Path) -> None:
    """Hold a folder's file until it is closed or the process ends. Raises ConfigError if another process does."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another process writes here; wait for it, or choose another --out") from None


@contextmanager
def _enough_room(path: Path) -> Iterator[None]:
    """Disk errors as RunError: what is stored stays, and a line cut short is dropped by --resume."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; what is finished is stored, --resume goes on") from error


def write_json(file: Path, values: Nested) -> None:
    """Write a JSON file, all or nothing."""
    files.write(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


def load_results(path: str | os.PathLike[str]) -> pandas.DataFrame:
    """One row a sample of a run folder: its fields, each score as `score:NAME`, each count as `forwards:KIND`.

    Raises ConfigError if the folder holds no run or a line is broken.
    """
    import pandas

    folder = Path(path)
    if not (folder / SPEC).is_file():
        raise ConfigError(f"{folder}: no run here (no {SPEC})")
    rows = []
    for record in read_samples(folder):
        texts = {k: encodable(v) for k, v in record.items() if isinstance(v, str)}  # as Arrow wants it
        row = {k: v for k, v in (record | texts).items() if k not in ("scores", "trace")}
        row |= {f"score:{name}": value for name, value in (record.get("scores") or {}).items()}
        trace = record.get("trace") or {}
        row |= {f"forwards:{kind}": count for kind, count in trace.get("forwards", {}).items()}
        row |= {name: trace.get(name) for name in ("slots", "predicted", "accepted")}
        rows.append(row)
    return pandas.DataFrame(rows)


def held_spec(folder: Path) -> RunSpec | None:
    """The spec of the run in a folder, None where there is no such folder or it is empty.

    Raises ConfigError if it holds something else, or a spec that cannot be read.
    """
    file = folder / SPEC
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run; choose another --out")
        return None
    values = read_json(file)
    values.pop("id", None)
    try:
        return build_spec(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _difference(held: RunSpec, asked: RunSpec) -> str:
    ours, theirs = held.identity(), asked.identity()
    name = next((n for n in {**theirs, **ours} if ours.get(n) != theirs.get(n)), "spec")
    return f"{name} is {json.dumps(ours.get(name))} there, {json.dumps(theirs.get(name))} here"


def _check_writable(folder: Path) -> None:
    """The nearest existing parent must be a folder we may write to."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder}: is a file, not a folder")
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"out={folder}: cannot be written ({parent} is no folder that we may write to)")
