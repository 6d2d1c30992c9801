"""Untrusted files: JSON, TOML and lines of text, of bounded size and depth; and atomic writes. No torch.

Every fault of a file is a ConfigError that names it. No content is executed.
"""

from __future__ import annotations

import gzip
import json
import os
import secrets
import stat
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from .errors import ConfigError

Nested = dict[str, Any]
"""Nested tables of plain values, as parsed from JSON or TOML."""
MAX_BYTES = 1 << 28
"""Size limit of a file that is read at once."""
MAX_LINE_BYTES = 1 << 26
"""Size limit of a line."""
_TOO_DEEP = "nested too deep"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for invalid JSON, and for values nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_toml(text: str) -> Nested:
    """The tables of a TOML text. Raises ValueError for invalid TOML, and for values nested too deep."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a file, without a byte order mark. A .gz is decompressed.

    Raises ConfigError naming the file if it is unreadable, no UTF-8, or longer than `max_bytes`.
    """
    with _opened(file) as handle:
        content = handle.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ConfigError(f"{file}: longer than {max_bytes >> 20} MiB, which no such file is")
    return _decoded(content, str(file))


def read_json(file: Path) -> Nested:
    """The object of a JSON file. Raises ConfigError naming the file."""
    text = read_text(file)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return values


def read_toml(file: Path) -> Nested:
    """The tables of a TOML file. Raises ConfigError naming the file."""
    text = read_text(file)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of all lines that are not blank. A .gz is decompressed.

    Raises ConfigError naming the file, and a line that is longer than MAX_LINE_BYTES or no UTF-8.
    """
    with _opened(file) as handle:
        for number, line in bounded_lines(handle, file):
            if line.strip():
                yield number, _decoded(line, f"{file}, line {number}")


def bounded_lines(handle: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of an open file. Raises ConfigError, naming `file`, at a line that is too long."""
    number = 0
    while line := handle.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ConfigError(f"{file}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
        yield number, line


def write(file: Path, text: str, errors: str = "strict") -> None:
    """Write a file atomically: a failure leaves the old content in place. Raises OSError.

    A symbolic link is kept, and its target replaced. Devices and pipes are written into.  errors: of UTF-8 encoding.
    """
    data = text.encode("utf-8", errors)
    # 1) devices and pipes cannot be replaced
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            with file.open("wb") as special:
                special.write(data)
            return
    except FileNotFoundError:
        pass  # a new file, or a dangling link
    # 2) write beside the target, under a name that nobody can guess; then rename
    target = Path(os.path.realpath(file))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as new:
            new.write(data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_new(file: Path, text: str) -> None:
    """Write a new file atomically. Raises ConfigError if it exists or cannot be written."""
    try:
        with file.open("x"):  # reserves the name, so that no file is replaced
            pass
        try:
            write(file, text)
        except BaseException:
            file.unlink()
            raise
    except FileExistsError as error:
        raise ConfigError(f"{file}: exists already; name another file, or remove it") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    try:
        with file.open("rb") as raw:
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{str(file)!r}: no name of a file ({error})") from error  # a null byte


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not text: {error}") from error
