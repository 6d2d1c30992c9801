"""Lines, comprehensions, comments and class names."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .sources import MODULES, ROOT, c_files, nodes, python_files

DENSE_CORE = ("fluid_model/decoders", "fluid_model/engine", "fluid_model/forward")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Longest(NamedTuple):
    """What is longest, and its lines."""

    name: str
    lines: int


class Density(NamedTuple):
    """Of the dense core. code: lines that hold code, not blank, comment or docstring."""

    lines: int
    code: int
    comments: int
    comprehensions: int


def longest_file() -> Longest:
    """Python and C."""
    files = [*python_files(), *c_files()]
    return max((Longest(short(file), len(file.read_text().splitlines())) for file in files), key=lambda one: one.lines)


def longest_function() -> Longest:
    """Of Python."""
    return max((one for file in python_files() for one in functions(file)), key=lambda one: one.lines)


def functions(file: Path) -> Iterator[Longest]:
    """Every function of a file, those inside others too, decorators apart."""
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Longest(f"{short(file)}:{node.name}", node.end_lineno - node.lineno + 1)


def density(folders: Sequence[str] = DENSE_CORE) -> Density:
    """Of all Python files below some folders, together."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    lines = code = comments = comprehensions = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        comprehensions += sum(isinstance(node, COMPREHENSIONS) for node in nodes(file))
        occupied = set[int]()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            comments += token.type == tokenize.COMMENT
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
                occupied.add(token.start[0])
        code += len(occupied)
    return Density(lines, code, comments, comprehensions)


def repeated_classes() -> dict[str, list[str]]:
    """Class names that several modules of the two packages and bench define, with the modules."""
    owners: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        if module.startswith(("fluid_model", "fluid_eval", "bench")):
            for node in nodes(file):
                if isinstance(node, ast.ClassDef):
                    owners.setdefault(node.name, []).append(module)
    return {name: sorted(modules) for name, modules in sorted(owners.items()) if len(modules) > 1}


def short(file: Path) -> str:
    """A file's path in the checkout."""
    return file.relative_to(ROOT).as_posix()
