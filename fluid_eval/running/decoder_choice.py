"""The default decoder: the one that the checkpoint was adapted to. A run prints which, and why.

    checkpoint                         decoder
    plain causal model                 ar
    FLUID, with a K-head               fluid
    FLUID adapter without a K-head     ar
    another adaptation                 the first decoder whose `methods` name it (`fluid_model.registry`)

The name enters the spec, and so its id. torch is imported only when a model is inspected.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.files import Nested
from fluid_model.registry import default_decoder
from fluid_model.settings import ArSettings

from ..benchmarks import datasets
from ..common.spec import RunSpec, tables

if TYPE_CHECKING:
    from fluid_model.checkpoints.checkpoint import ModelInfo


def with_decoder(values: Mapping[str, Any]) -> Nested:
    """A run's values with a decoder name: as given, else the one that the model was adapted to.

    Malformed values are returned unchanged: `build_spec` reports them. Raises ConfigError if the path holds no model.
    """
    values = tables(values)
    decoder, model = values.get("decoder", {}), values.get("model")
    if values.get("backend") is not None:  # then it writes, and no decoder
        return values
    if not isinstance(decoder, Mapping) or "name" in decoder or not isinstance(model, Mapping):
        return values
    path, method, base = model.get("path"), model.get("method"), model.get("base")
    trust = model.get("trust_remote_code")
    names_valid = isinstance(path, str) and all(isinstance(name, str | None) for name in (method, base))
    if not names_valid or not isinstance(trust, bool | None):
        return values
    return {**values, "decoder": {"name": _decoder_of(path, method, bool(trust), base), **decoder}}


def adapted_for(info: ModelInfo) -> str:
    """The decoder that a model was adapted to; ar for a plain causal model and for FLUID without a K-head.

    Raises ConfigError if no decoder serves its method.
    """
    return default_decoder(info.method, has_head=info.has_head)


def reason(spec: RunSpec, info: ModelInfo) -> str:
    """One line for the terminal: the decoder, and why.  info: of the spec's model."""
    model, name = Path(spec.model.path).name, spec.decoder.name
    own = adapted_for(info)
    if name != own:
        return f"{model}: decoder {name}, as asked for; the checkpoint was adapted to {own} (--decoder {own})"
    if info.method is None:
        return f"{model}: decoder ar, for it is a plain causal model"
    if own == ArSettings.name:
        return f"{model}: decoder ar, for it was adapted to {info.method} and has no K-head yet"
    if info.method != own:
        shifted = ", shifted by one" if info.shift else ""
        return f"{model}: decoder {name}{shifted}, which serves the method it was adapted to, {info.method}"
    return f"{model}: decoder {name}, which the checkpoint was adapted to; --decoder chooses another"


@cache
def _decoder_of(path: str, method: Any, trust: bool, base: str | None) -> str:
    """Cached: a sweep asks for each of its points."""
    from fluid_model.checkpoints.checkpoint import describe

    if not Path(path).expanduser().is_dir():
        datasets.go_offline_if_unreachable()
    return adapted_for(describe(path, method, trust_remote_code=trust, base=base))
