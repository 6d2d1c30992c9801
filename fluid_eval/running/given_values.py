"""From settings as given to a spec: what environment, profile and model add. For the command line and for Python.

torch is imported only when a model is inspected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluid_model.common.fields import put
from fluid_model.common.files import Nested

from ..benchmarks.profiles import chat_of
from ..common.spec import RunSpec, build_spec, tables
from .decoder_choice import with_decoder


def completed(values: Mapping[str, Any]) -> Nested:
    """Settings with the data folder of FLUID_DATA_DIR and the chat of their profile, where they name none."""
    values = dict(values)
    if data_dir := os.environ.get("FLUID_DATA_DIR"):
        values.setdefault("data_dir", data_dir)
    return chat_of(values)


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
