"""Settings from plain values: `a.b=c` assignments, and dataclasses built with every name and type checked. No torch."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .files import Nested, parse_toml
from .names import did_you_mean


def at_least(name: str, value: float | None, low: float) -> None:
    """Raise ConfigError if the value is below `low`. None passes."""
    if value is not None and value < low:
        raise ConfigError(f"{name}={value} must be at least {low}")


def assign(values: Nested, setting: str) -> None:
    """Apply one assignment `a.b=c` to nested values. c is parsed as TOML, else taken as plain text."""
    name, sign, text = setting.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {setting}: must read name=value")
    put(values, name.strip(), read_value(text))


def read_value(text: str) -> Any:
    """The value of a TOML expression, else the text itself: `1` is 1, `[a]` is "[a]"."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def put(values: Nested, name: str, value: Any) -> None:
    """Set a dotted name in nested values; missing tables are created. Raises ConfigError at a value on the way."""
    *tables, last = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {table} is a value, not a table")
    values[last] = value


def build(
    cls: type[Any], values: Mapping[str, Any], where: str = "", how_to_give: Mapping[str, str] | None = None
) -> Any:
    """A dataclass from plain values, with every name and type checked.

    where: prefix of names in messages ("decoder.").  how_to_give: hints of messages on missing fields, by name.
    Raises ConfigError naming an unknown field (with the known ones), a missing one or a bad value.
    """
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for name in values:
        if name not in known:
            owner = f" of decoder {cls.name!r}" if where == "decoder." else ""
            meant = did_you_mean(name, known, prefix=where)
            raise ConfigError(
                f"{where}{name} is no setting{owner}; {meant}known: {', '.join(where + n for n in known)}"
            )
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{name} is missing" + (how_to_give or {}).get(name, ""))
    return cls(**{name: _coerce(value, hints[name], where + name) for name, value in values.items()})


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """The value in the type of the hint. Raises ConfigError for another type."""
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, name + ".")
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            if is_dataclass(option) and isinstance(value, Mapping):
                return _coerce(value, option, name)  # an error inside a table keeps its own message
            try:
                return _coerce(value, option, name)
            except ConfigError:
                continue
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        meant = did_you_mean(value, get_args(hint))
        raise ConfigError(f"{name}={value!r} is unknown; {meant}known: {', '.join(map(str, get_args(hint)))}")
    elif get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, get_args(hint)[0], name) for item in value)
    elif get_origin(hint) is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif get_origin(hint) is list:  # of any values
        if isinstance(value, list):
            return list(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif type(value) is hint:  # isinstance would accept true as an integer
        return value
    raise ConfigError(f"{name}={value!r} must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (tuple, list):
        return "a list"
    return names.get(hint, "a table")
