"""The run folder: its layout, and the one process that writes it. Neither torch nor lm-eval.

    runs/gsm8k-tiny-fluid-340f09bd/
    ├── spec.json          the RunSpec and its id                                          at the first answer
    ├── environment.json   versions, commit, device, weights, data fingerprints             at the first answer
    ├── samples.jsonl      one record a line, with a checksum (`sample_records`)            as answers arrive
    ├── result.json        the table: scores with intervals, costs, health, conditions      last: the run is finished
    ├── repeats.jsonl      --speed-repeats: times of the same answers written again
    ├── audit.json         fluid-eval audit: losslessness against greedy AR
    ├── khead.json         fluid-eval khead: K-head diagnostics
    └── report.html        fluid-eval report

A sweep is a folder of runs: `sweep.json` names them, `points/` holds them.

The life of a run folder (`Run`):

    Run(folder, spec)   check only ──▶ begin: lock, drop a torn line, write spec and environment
                                       ──▶ append: a line each, scores missing ──▶ finish: scored samples, result

A process that dies after `begin` leaves a folder that `Run(..., resume=True)` continues. Samples are appended to a
locked file: one process writes at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fluid_model.common import files
from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, read_json

from ..common.spec import RunSpec, build_spec
from .sample_records import Record as Record
from .sample_records import encode as encode
from .sample_records import parse as parse
from .samples_file import REPLACED, SampleIndex, identity, open_for_reading, read_lines, torn_bytes
from .samples_file import lock as lock
from .stored_values import read_environment

SPEC, ENVIRONMENT, SAMPLES, RESULT = "spec.json", "environment.json", "samples.jsonl", "result.json"
AUDIT, KHEAD, REPEATS = "audit.json", "khead.json", "repeats.jsonl"
RUN_FILES = (
    SPEC, ENVIRONMENT, SAMPLES, RESULT, AUDIT, KHEAD, REPEATS, "report.html", ".*.tmp"
)  # fmt: skip
"""Names that this package writes into a run folder; any other file there is the user's."""
POINTS, SWEEP = "points", "sweep.json"


class Run:
    """A run folder that this process writes. samples: stored records by key.  notices: for the result's reader."""

    def __init__(self, folder: Path, spec: RunSpec, *, resume: bool = False) -> None:
        """Check the folder and index its samples; `begin` is the first to write.

        Raises ConfigError if the folder holds another spec, holds this one and `resume` is false, or is not writable.
        """
        self.folder = folder
        self.spec = spec
        self.samples = SampleIndex(folder / SAMPLES)
        self.notices: list[str] = []
        self._file: IO[bytes] | None = None
        self._torn = 0
        self._end = 0
        """Bytes of whole lines in the samples file; `_torn` bytes follow them until `begin`."""
        stored = held_spec(folder)
        if stored is None:
            _check_writable(folder)
        elif stored.id != spec.id:
            raise ConfigError(f"{folder} holds another run ({_difference(stored, spec)}); choose another --out")
        elif not resume:
            state, then = "a run that was not finished", "go on"
            if (folder / RESULT).exists():
                state, then = "a finished run", "see its result"
            raise ConfigError(f"{folder} holds {state} of this spec; pass --resume to {then}, or another --out")
        else:
            self._index_samples()

    def _index_samples(self) -> None:
        """Index the samples of an earlier session. Failed requests are left out, and so asked again."""
        if (self.folder / SAMPLES).exists():
            self._torn = torn_bytes(self.folder / SAMPLES)
            for record, offset, size in self.samples.read(self._torn):
                self._end = offset + size
                if "lost" not in record:
                    self.samples.add(record, offset, size)
        if self.samples:
            self.notices.append(
                f"{len(self.samples)} samples are from an earlier session; wall time is the last session's"
            )

    def begin(self, environment: Nested) -> None:
        """Create the folder, lock the samples, write spec and environment.

        Raises ConfigError if stored answers may differ from new ones (other weights, device, dtype or versions), or if
        another process writes here; RunError if the disk is full.
        """
        self.check_same_setup(environment)
        with _disk_errors(self.folder):
            # 1) own the folder
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_samples()
            self._drop_torn_line()
            # 2) the stored result covers fewer samples than there will be
            (self.folder / RESULT).unlink(missing_ok=True)
            # 3) the head
            before = read_environment(self.folder / ENVIRONMENT)
            environment["sessions"] = 1 + (before.get("sessions", 1) if self.samples else 0)
            write_json(self.folder / SPEC, {"id": self.spec.id, **self.spec.to_dict()})
            write_json(self.folder / ENVIRONMENT, environment)

    def _lock_samples(self) -> None:
        """Open the samples for appending and lock them.

        Raises ConfigError if another process has the lock, or has written or replaced the file since it was indexed.
        """
        self._file = (self.folder / SAMPLES).open("ab", buffering=0)
        try:
            lock(self._file, self.folder)
            opened, at_path = identity(self._file), (self.folder / SAMPLES).stat()
            unchanged = opened == (at_path.st_dev, at_path.st_ino) and self.samples.identity in (None, opened)
            if not unchanged or self._file.tell() != self._end + self._torn:
                raise ConfigError(f"{self.folder}: {REPLACED}")
            self.samples.identity = opened
        except (ConfigError, OSError):
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Store one sample: the operating system has it before this returns. Raises RunError if the disk is full."""
        assert self._file is not None, "begin comes first"
        line = encode(record)
        with _disk_errors(self.folder / SAMPLES):
            unwritten = line
            while unwritten:  # on a nearly full disk a write is partial, and the next one raises
                unwritten = unwritten[self._file.write(unwritten) :]
        self.samples.add(record, self._end, len(line))
        self._end += len(line)

    def finish(self, records: Iterable[Record], result: Nested) -> None:
        """Replace the samples by their scored form, then write the result: all or nothing."""
        draft = self.folder / f".{SAMPLES}.tmp"
        with _disk_errors(draft):
            if self._file is None:  # every answer was stored already, so `begin` was never called
                self._lock_samples()
            with draft.open("wb") as file:
                lock(file, self.folder)  # this becomes the samples file, and must be locked until the result is there
                file.writelines(encode(record) for record in records)
                file.flush()
                os.replace(draft, self.folder / SAMPLES)
                write_json(self.folder / RESULT, result)
        self.close()

    def close(self) -> None:
        """Close the samples file; a run left unfinished can be resumed."""
        self.samples.close()
        if self._file is not None:
            self._file.close()

    def check_same_setup(self, environment: Nested) -> None:
        """Raise ConfigError if weights, device, dtype or versions differ from those of the stored answers."""
        if not self.samples:
            return
        before = read_environment(self.folder / ENVIRONMENT).get("same", {})
        now = environment.get("same", {})
        for name in now:
            if name in before and before[name] != now[name]:
                raise ConfigError(
                    f"{self.folder} was begun with {name} {before[name]}, here it is {now[name]}; answers of both in "
                    "one table would mislead: choose another --out"
                )

    def _drop_torn_line(self) -> None:
        if self._torn:
            file = self.folder / SAMPLES
            os.truncate(file, file.stat().st_size - self._torn)
            self.notices.append(f"{file}: the last line was cut short; dropped {self._torn} bytes")
            self._torn = 0


def read_samples(folder: Path, *, torn: int = 0) -> Iterator[Record]:
    """Samples of a run folder, in file order, up to the last `torn` bytes.

    Raises ConfigError naming file and line of one that is no sample.
    """
    if (folder / SAMPLES).exists():
        with open_for_reading(folder / SAMPLES) as handle:
            for record, _, _ in read_lines(handle, folder / SAMPLES, torn):
                yield record


def held_spec(folder: Path) -> RunSpec | None:
    """The spec of the run in a folder; None where the folder is missing or empty.

    Raises ConfigError if the folder holds something else, or a spec that cannot be read.
    """
    file = folder / SPEC
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run; choose another --out")
        return None
    values = read_json(file)
    values.pop("id", None)
    try:
        return build_spec(values, stored=True)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def write_json(file: Path, values: Nested) -> None:
    """Write a JSON file, all or nothing."""
    files.write(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Disk errors as RunError: stored samples stay, and --resume drops a torn line."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; finished samples are stored, --resume continues") from error


def _difference(stored: RunSpec, asked: RunSpec) -> str:
    """The first field in which two specs' identities differ."""
    ours, theirs = stored.identity(), asked.identity()
    name = next((n for n in {**theirs, **ours} if ours.get(n) != theirs.get(n)), "spec")
    return f"{name} is {json.dumps(ours.get(name))} there, {json.dumps(theirs.get(name))} here"


def _check_writable(folder: Path) -> None:
    """Raise ConfigError unless the nearest existing parent is a folder that this process may write to."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder}: is a file, not a folder")
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"out={folder}: cannot be written ({parent} is no folder that we may write to)")
