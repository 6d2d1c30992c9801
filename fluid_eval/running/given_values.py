"""From settings as given to a spec: what environment, profile and model add. For the command line and for Python.

torch is imported only when a model is inspected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import put
from fluid_model.common.files import Nested

from ..benchmarks.profiles import chat_of
from ..common.bundled import resolved
from ..common.spec import RunSpec, build_spec, tables
from .decoder_choice import with_decoder


def completed(values: Mapping[str, Any]) -> Nested:
    """Settings with the data folder of FLUID_DATA_DIR and the chat of their profile, where they name none."""
    values = _with_backends_model(dict(values))
    if data_dir := os.environ.get("FLUID_DATA_DIR"):
        values.setdefault("data_dir", data_dir)
    return chat_of(values)


def _with_backends_model(values: Nested) -> Nested:
    """The model that a backend's arguments name as the run's model. Raises ConfigError if the run names another."""
    backend = values.get("backend")
    if not isinstance(backend, Mapping) or not isinstance(backend.get("args"), Mapping):
        return values
    args = dict(backend["args"])
    given = [args.pop(name) for name in ("pretrained", "model") if name in args]
    named = tables(values).get("model", {})
    path = named.get("path") if isinstance(named, Mapping) else None
    if given and path is not None and resolved(str(given[0])) != path:
        raise ConfigError(f"model={path}, and {given[0]} in --backend-args: name one model")
    model = {"model": {"path": str(given[0])}} if given and path is None else {}
    return {**values, **model, "backend": {**backend, "args": args}}


def nested(settings: Mapping[str, Any]) -> Nested:
    """Settings by dotted names, as tables, or both: `{"decoder": "fluid", "decoder.confidence": 0.9}`.

    Raises ConfigError if a dotted name leads through a value.
    """
    undotted = {name: value for name, value in settings.items() if "." not in name}
    values: Nested = tables(plain(undotted))
    for name in settings.keys() - undotted.keys():
        put(values, name, plain(settings[name]))
    return values


def spec_from(values: Mapping[str, Any]) -> RunSpec:
    """The spec of nested settings, with the decoder of its model if none is named.

    Raises ConfigError naming unknown settings and bad values.
    """
    return build_spec(with_decoder(completed(values)))


def plain(value: Any) -> Any:
    """A value as a TOML file could hold it: tuples become lists, paths text, at any depth."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, Path) else value
