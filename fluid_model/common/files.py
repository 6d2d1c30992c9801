"""Files that nobody vouches for: JSON, TOML and lines of text, of bounded size and depth; a new one written. No torch.

Whatever is wrong with a file is a ConfigError that names it; nothing of it is ever run.
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
"""Settings as a file holds them: nested tables of plain values."""
MOST_BYTES = 1 << 28
"""Of a file that is read whole."""
MOST_LINE = 1 << 26
"""Bytes of a line."""
_TOO_DEEP = "nested too deep"


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError for what is none, and for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def parse_toml(text: str) -> Nested:
    """What TOML says. Raises ValueError for what is none, and for what is nested too deep."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def read_text(file: Path, most: int = MOST_BYTES) -> str:
    """A whole file as text, without a byte order mark; one named .gz is unpacked on the way.

    Raises ConfigError naming the file, also where it has more than `most` bytes.
    """
    with _opened(file) as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"{file}: longer than {most >> 20} MiB, which no such file is")
    return _decoded(content, str(file))


def read_json(file: Path) -> Nested:
    """A JSON object. Raises ConfigError naming the file."""
    text = read_text(file)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return values


def read_toml(file: Path) -> Nested:
    """A TOML file's tables. Raises ConfigError naming the file."""
    text = read_text(file)
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1; a file named .gz is unpacked on the way.

    Raises ConfigError naming the file, and the line that is longer than MOST_LINE bytes or no text.
    """
    with _opened(file) as handle:
        for number, line in bounded(handle, file):
            if line.strip():
                yield number, _decoded(line, f"{file}, line {number}")


def bounded(handle: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of an open file, with their numbers from 1. Raises ConfigError, naming `file`, at one that is too long."""
    number = 0
    while line := handle.readline(MOST_LINE + 1):
        number += 1
        if len(line) > MOST_LINE:
            raise ConfigError(f"{file}, line {number}: longer than {MOST_LINE >> 20} MiB")
        yield number, line


def write(file: Path, text: str, errors: str = "strict") -> None:
    """Write a file, all or nothing: until all of it is written, what was there stays. Raises OSError.

    A link stays one: what it leads to is replaced. What is there and is no regular file, such as a device or a pipe, is
    written into.  errors: of the encoding, UTF-8.
    """
    data = text.encode("utf-8", errors)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            with file.open("wb") as there:
                there.write(data)
            return
    except FileNotFoundError:
        pass  # a new one, or a link to one
    target = Path(os.path.realpath(file))
    draft = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")  # nobody else knows its name before
    try:
        with draft.open("xb") as new:
            new.write(data)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_new(file: Path, text: str) -> None:
    """Write a file that is not there yet, all or nothing. Raises ConfigError if it is there, or cannot be written."""
    try:
        with file.open("x"):  # claims the name: nobody's file is replaced
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
        raise ConfigError(f"{str(file)!r}: no name of a file ({error})") from error  # it holds a zero


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not text: {error}") from error
