"""`samples.jsonl`: one record a line, appended as answers arrive, read by key without loading the file.

    offset 0     {"key": "gsm8k/0", …, "crc32": "1ebb2838"}\\n        a line, see `sample_records`
    offset 812   {"key": "gsm8k/1", …, "crc32": "5c90aa17"}\\n
    offset 1630  {"key": "gsm8k/2", "prompt                         a torn line: the process died while it wrote

`SampleIndex` holds a key, offset, size and prompt hash a sample. Torn bytes at the end are not an error; a damaged line
before them is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import bounded_lines

from .sample_records import Record, check_record, parse

REPLACED = "another process wrote here just now, or removed it; try again with --resume"
"""The error where the file at a path is not the one that was read."""
_STEP = 1 << 20
"""Bytes read at a time, backwards from a file's end."""


class SampleIndex(Mapping[str, Record]):
    """Records of a samples file by key. Each access reads one line from disk."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: IO[bytes] | None = None
        self._lines: dict[str, tuple[int, int, str]] = {}
        """Offset, size and prompt hash of each sample's line."""
        self.identity: tuple[int, int] | None = None
        """Which file the offsets belong to: a finished run puts another file at the same path."""

    def read(self, torn: int) -> Iterator[tuple[Record, int, int]]:
        """All records with offset and size of their lines, up to the last `torn` bytes. `add` puts them in the index.

        Raises ConfigError naming the line that is no sample.
        """
        with open_for_reading(self._file) as handle:
            self.identity = identity(handle)
            yield from read_lines(handle, self._file, torn)

    def add(self, record: Record, offset: int, size: int) -> None:
        """Index a record whose line stands at these bytes of the file."""
        self._lines[record["key"]] = offset, size, record["prompt_hash"]

    def prompt_hash(self, key: str) -> str | None:
        """Of the prompt that a stored sample answers; None if the sample is not stored."""
        return self._lines[key][2] if key in self._lines else None

    def __getitem__(self, key: str) -> Record:
        offset, size, _ = self._lines[key]
        if self._handle is None:
            self._handle = open_for_reading(self._file)
            if identity(self._handle) != self.identity:
                raise ConfigError(f"{self._file.parent}: {REPLACED}")
        self._handle.seek(offset)
        return parse(self._handle.read(size))

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def read_lines(handle: IO[bytes], file: Path, torn: int) -> Iterator[tuple[Record, int, int]]:
    """Records with offset and size of their lines, up to the last `torn` bytes. file: named in errors.

    Raises ConfigError naming the line that is no sample.
    """
    end, offset = os.fstat(handle.fileno()).st_size - torn, 0
    for number, line in bounded_lines(handle, file):
        if offset >= end:
            return
        try:
            record = parse(line)
            check_record(record)
        except ValueError as error:
            raise ConfigError(
                f"{file}, line {number}: not a sample ({error}); without that line, --resume writes it again"
            ) from error
        yield record, offset, len(line)
        offset += len(line)


def torn_bytes(file: Path) -> int:
    """Bytes after the last newline: the line that a crash cut short. 0 where the file is missing."""
    if not file.exists():
        return 0
    with open_for_reading(file) as handle:
        size = start = handle.seek(0, os.SEEK_END)
        while start > 0:
            start = max(0, start - _STEP)
            handle.seek(start)
            if (newline := handle.read(_STEP).rfind(b"\n")) >= 0:
                return size - (start + newline + 1)
        return size


def open_for_reading(file: Path) -> IO[bytes]:
    """Raises ConfigError if the file cannot be opened."""
    try:
        return file.open("rb")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def identity(file: IO[bytes]) -> tuple[int, int]:
    """Device and inode of an open file, which tell it from another one at the same path."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def lock(file: IO[bytes], folder: Path) -> None:
    """Lock a folder's file until it is closed or the process ends. Raises ConfigError if another process holds it."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another process writes here; wait for it, or choose another --out") from None


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of `lock` on this file now. False where there is no such file."""
    import fcntl

    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
