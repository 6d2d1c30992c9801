"""Which decoder a run takes where none is named: the one its checkpoint was adapted to. A run says which, and why.

The name stands in the spec, and so in its id. Nothing heavy is imported until a model is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.files import Nested

from ..benchmarks import datasets
from ..common.spec import RunSpec, tables

if TYPE_CHECKING:
    from fluid_model.checkpoints.checkpoint import ModelInfo


def with_decoder(values: Mapping[str, Any]) -> Nested:
    """A run's values, its decoder named: as given, else the one the model was adapted to.

    What is no model or no table of settings is left as it is: `build_spec` says what is wrong with it.
    Raises ConfigError where the path holds no model.
    """
    values = tables(values)
    decoder, model = values.get("decoder", {}), values.get("model")
    if not isinstance(decoder, Mapping) or "name" in decoder or not isinstance(model, Mapping):
        return values
    path, method, trust, base = (model.get(name) for name in ("path", "method", "trust_remote_code", "base"))
    named = isinstance(path, str) and all(isinstance(name, str | None) for name in (method, base))
    if not named or not isinstance(trust, bool | None):
        return values
    return {**values, "decoder": {"name": _named(path, method, bool(trust), base), **decoder}}


def adapted_for(info: ModelInfo) -> str:
    """The decoder a model was adapted to: ar for a plain causal one, and for a FLUID adapter before it has a K-head."""
    return info.method if info.method is not None and (info.method != "fluid" or info.has_head) else "ar"


def reason(spec: RunSpec, info: ModelInfo) -> str:
    """One line: which decoder writes, and why.  info: of the spec's model."""
    model, name, own = Path(spec.model.path).name, spec.decoder.name, adapted_for(info)
    if name != own:
        return f"{model}: decoder {name}, as asked for; the checkpoint was adapted to {own} (--decoder {own})"
    if info.method is None:
        return f"{model}: decoder ar, for it is a plain causal model"
    if info.method != own:
        return f"{model}: decoder ar, for it was adapted to {info.method} and has no K-head yet"
    return f"{model}: decoder {name}, which the checkpoint was adapted to; --decoder chooses another"


@cache
def _named(path: str, method: Any, trust: bool, base: str | None) -> str:
    """Looked at once a process: a sweep asks for each of its points."""
    from fluid_model.checkpoints.checkpoint import describe

    if not Path(path).expanduser().is_dir():
        datasets.go_offline_if_unreachable()
    return adapted_for(describe(path, method, trust_remote_code=trust, base=base))
