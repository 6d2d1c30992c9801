"""Every setting by name with type, default and meaning, read from the dataclasses. No torch."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass

from fluid_model.common.errors import ConfigError
from fluid_model.registry import decoder_named, decoders

from .spec import BackendSpec, ChatSpec, EngineSpec, HealthSpec, ModelSpec, RunSpec

TABLES: dict[str, type] = {
    "model": ModelSpec,
    "backend": BackendSpec,
    "chat": ChatSpec,
    "engine": EngineSpec,
    "health": HealthSpec,
}
"""Tables of a spec, beside `decoder`, which has a class for each decoder."""


@dataclass(frozen=True)
class Setting:
    """One setting. name: as --set takes it.  decoder: whose setting it is; None for others."""

    name: str
    type: str
    default: str
    about: str
    decoder: str | None = None


def all_settings() -> list[Setting]:
    """Every setting: the run's own, then those of its tables."""
    settings, known = [*_of(RunSpec, "")], decoders()
    settings += [Setting("decoder.name", "text", "the model's own", f"One of {', '.join(known)}, or MODULE:CLASS.")]
    for name, kind in known.items():
        settings += _of(kind, "decoder.", name)
    for table, kind in TABLES.items():
        settings += _of(kind, f"{table}.")
    return settings


def settings_named(name: str | None) -> list[Setting]:
    """Settings of this name, or whose names begin with it, or of this decoder; all for None.

    Raises ConfigError, naming close ones.
    """
    if name is not None and ":" in name:
        decoder_named(name)  # from here on it is listed
    settings = all_settings()
    chosen = [one for one in settings if name in (None, one.name)]
    chosen = chosen or [one for one in settings if one.name.startswith(str(name))]
    chosen = chosen or [one for one in settings if one.name.rpartition(".")[2] == name]
    chosen = chosen or [one for one in settings if one.decoder == name]
    if not chosen:
        close = difflib.get_close_matches(str(name), {one.name for one in settings})
        meant = f"did you mean {', '.join(close)}? " if close else ""
        raise ConfigError(f"setting {name!r} is unknown; {meant}`fluid-eval settings` lists them")
    return chosen


def _of(kind: type, prefix: str, decoder: str | None = None) -> Iterator[Setting]:
    """A class's settings; its tables are left out."""
    abouts = docstrings_of(kind)
    for f in fields(kind):
        if is_dataclass(f.default_factory) or f.name in (*TABLES, "decoder"):
            continue
        default = "none, must be given"
        if f.default is not MISSING:
            default = "unset" if f.default is None else str(f.default)
            default = default.lower() if isinstance(f.default, bool) else default
        elif f.default_factory is not MISSING:
            default = str(f.default_factory())
        yield Setting(prefix + f.name, _in_words(str(f.type)), default, abouts.get(f.name, ""), decoder)


def docstrings_of(kind: type) -> dict[str, str]:
    """The docstring below each field of a class, on one line; of a preset's, those of the decoder that it presets."""
    documents: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        documents |= _docstrings_in(base)
    return documents


def _docstrings_in(kind: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    documents = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            documents[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return documents


def _in_words(hint: str) -> str:
    """A type hint in words: `Literal["a", "b"] | None` as "a | b"."""
    hint = hint.removesuffix(" | None").replace("Rule", "probability | margin | entropy")
    for sign, word in (("tuple[str, ...]", "list of texts"), ("dict[str, Any]", "table"), ("Literal", "")):
        hint = hint.replace(sign, word)
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    parts = hint.replace("[", "").replace("]", "").replace('"', "").replace(", ", " | ").split(" | ")
    return " | ".join(words.get(part, part) for part in parts)
