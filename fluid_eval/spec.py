"""What a run is: a frozen spec, checked as a whole before anything else happens. No torch here.

A spec comes from a TOML file, `--set a.b=c` and flags, later ones winning. Its id is the hash of what decides the
answers; where and how fast they are computed (workers, batch size, folder) is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fluid_model.errors import ConfigError
from fluid_model.settings import DECODERS, ArSettings, DecoderSettings, FluidSettings

Nested = dict[str, Any]
"""Settings as a file holds them: nested tables of plain values."""


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint, and how it is loaded."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tau: float | None = None
    mask_token: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """Who does the work. It changes how long a run takes, never what it answers."""

    kind: Literal["inline", "ray"] = "inline"
    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        _at_least("engine.workers", self.workers, 1)
        if self.kind == "inline" and self.workers not in (None, 1):
            raise ConfigError(f"engine.workers={self.workers}: the inline engine has one; use --engine ray")


@dataclass(frozen=True)
class RunSpec:
    """One run: a model, a decoder, tasks."""

    tasks: tuple[str, ...]
    model: ModelSpec
    decoder: DecoderSettings = field(default_factory=ArSettings)
    engine: EngineSpec = field(default_factory=EngineSpec)
    data_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    seed: int = 1234
    allow_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks={','.join(self.tasks)!r} must name at least one task, each once")
        _at_least("limit", self.limit, 1)
        _at_least("num_fewshot", self.num_fewshot, 0)
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        if self.batch_size != "auto":
            _at_least("batch_size", self.batch_size, 1)

    def to_dict(self) -> Nested:
        """Nested plain values; building a spec from them gives this spec again."""
        values = json.loads(json.dumps(asdict(self)))
        values["decoder"] = {"name": self.decoder.name, **values["decoder"]}
        return dict(values)

    def identity(self) -> Nested:
        """What decides the answers."""
        values = self.to_dict()
        for name in ("engine", "batch_size", "data_dir", "allow_code"):
            del values[name]
        return values

    @property
    def id(self) -> str:
        """12 hex digits of the identity's hash."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name}={value} must be at least {low}")


def read_toml(file: Path) -> Nested:
    """A spec file's tables. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error


def assign(values: Nested, setting: str) -> None:
    """Apply one `a.b=c` to nested values. c is read as TOML where it is, as plain text otherwise."""
    name, sign, text = setting.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {setting}: must read name=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    put(values, name.strip(), value)


def put(values: Nested, name: str, value: Any) -> None:
    """Set a dotted name in nested values, making tables on the way."""
    *tables, last = name.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {table} is a value, not a table")
    values[last] = value


def build_spec(values: Mapping[str, Any]) -> RunSpec:
    """A spec from nested values. Raises ConfigError naming unknown fields (with the known ones) and bad values."""
    values = dict(values)
    decoder = values.pop("decoder", {})
    if isinstance(decoder, str):
        decoder = {"name": decoder}
    if isinstance(values.get("model"), str):
        values["model"] = {"path": values["model"]}
    if isinstance(values.get("tasks"), str):
        values["tasks"] = [name.strip() for name in values["tasks"].split(",") if name.strip()]
    settings = _decoder(dict(decoder))
    spec: RunSpec = _build(RunSpec, {**values, "decoder": settings}, "")
    return spec


def _decoder(values: Nested) -> DecoderSettings:
    name = values.pop("name", "ar")
    if name not in DECODERS:
        raise ConfigError(f"decoder={name!r} is unknown; known: {', '.join(DECODERS)}")
    settings: ArSettings | FluidSettings = _build(DECODERS[name], values, "decoder.")
    return settings


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values, with every name and type checked."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for name in values:
        if name not in known:
            what = f" of decoder {cls.name!r}" if where == "decoder." else ""
            raise ConfigError(f"{where}{name} is no setting{what}; known: {', '.join(where + n for n in known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{name} is missing" + _HOW_TO_GIVE.get(name, ""))
    return cls(**{name: _coerce(value, hints[name], where + name) for name, value in values.items()})


_HOW_TO_GIVE = {"tasks": ": pass --tasks gsm8k,math500", "model": ": pass --model FOLDER_OR_HUB_ID"}


def _coerce(value: Any, hint: Any, name: str) -> Any:
    """The value as the hint wants it, or ConfigError."""
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return _build(hint, value, name + ".")
    elif get_origin(hint) in (Union, types.UnionType):
        if isinstance(value, DecoderSettings):
            return value
        for option in get_args(hint):
            try:
                return _coerce(value, option, name)
            except ConfigError:
                continue
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{name}={value!r} is unknown; known: {', '.join(map(str, get_args(hint)))}")
    elif get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, get_args(hint)[0], name) for item in value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None):
        if value is None:
            return None
    elif type(value) is hint:  # exactly: true is no whole number
        return value
    raise ConfigError(f"{name}={value!r} must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list"
    return names.get(hint, "a table")
