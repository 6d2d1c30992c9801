"""The cost of an adaptation, stage by stage: `fluid-eval tax`.

AR parent → adapted weights decoded as AR → verified parallel decoding → unverified parallel decoding. One sweep runs
all stages; each is then compared in pairs with the stage before it and with the parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.registry import decoder_named, default_decoder, setting_names
from fluid_model.settings import DecoderSettings

from ..common.spec import tables
from ..sweeps.grid import SweepPlan, plan
from .compare import compare

UNVERIFIED = "dropping verification"
SHARED_MODEL_SETTINGS = ("dtype", "device", "trust_remote_code")
"""Model settings that the parent shares; the others describe the adapted model alone."""
SAMPLING = ("temperature", "top_p")
"""Settings that all decoders have, and that must be equal over the stages."""


@dataclass(frozen=True)
class AdaptationStage:
    """One run of the comparison. name: the change from the stage before.  settings: of this stage, by dotted name."""

    name: str
    settings: Mapping[str, Any]


def stages(values: Nested, parent: str, kind: type[DecoderSettings]) -> list[AdaptationStage]:
    """The stages for an adapted model's decoder, the parent's first. values: of the model's run, decoder included.

    Stages that do not exist are left out: weights that read in both directions cannot decode as AR, and only FLUID
    verifies its drafts.
    """
    # 1) settings of the parent, of the adapted weights as AR, of the parallel decoder
    decoder = values.get("decoder", {})
    sampling = {f"decoder.{name}": decoder[name] for name in SAMPLING if name in decoder}
    adapted = {f"model.{name}": value for name, value in values["model"].items()}
    as_ar = {**adapted, "decoder.name": "ar", **sampling}
    parallel = {**adapted, "decoder.name": kind.name, **sampling}
    # 2) the stages that this decoder has
    first = AdaptationStage("parent, AR", {"model.path": parent, "decoder.name": "ar", **sampling})
    if kind.scorer is not None:
        return [first, AdaptationStage("adaptation, diffusion", parallel)]
    second = AdaptationStage("adaptation", as_ar)
    if "verify" not in setting_names(kind):
        return [first, second, AdaptationStage("block diffusion", parallel)]
    verified = AdaptationStage("verified parallel decoding", {**parallel, "decoder.verify": True})
    return [first, second, verified, AdaptationStage(UNVERIFIED, {**parallel, "decoder.verify": False})]


def plan_stages(values: Nested, parent: str, method: str | None) -> tuple[list[AdaptationStage], SweepPlan]:
    """The stages and the sweep that runs them.

    values: of the adapted model's run, as a spec file holds them.  method: adaptation method of the model.
    Raises ConfigError where the model is not adapted, is its own parent, or a stage's settings are invalid.
    """
    values = tables(values)
    model = values["model"]["path"]
    own = default_decoder(method)
    kind = decoder_named(values.get("decoder", {}).get("name", own))
    if method is None or method not in kind.methods:
        status = f"was adapted to {method}" if method else "is a plain causal model"
        raise ConfigError(f"tax: {model} {status}; name an adapted model, and no decoder but its own")
    planned_stages = stages(values, parent, kind)
    shared = {name: value for name, value in values["model"].items() if name in SHARED_MODEL_SETTINGS}
    base = {**values, "model": shared, "decoder": {**values.get("decoder", {}), "name": kind.name}}
    planned = plan({**base, "sweep": {"point": [dict(stage.settings) for stage in planned_stages]}})
    if len(planned.points) < len(planned_stages):
        raise ConfigError(f"tax: {model} is its own parent; name with --parent the model it was adapted from")
    return planned_stages, planned


def measure(planned_stages: list[AdaptationStage], folders: list[Path]) -> Nested:
    """Each stage compared with the stage before it, and with the parent; see `compare`.

    folders: finished runs, one a stage. Protocols differ at most in the chat template, which is reported and allowed.
    """
    step_pairs = [compare(both, across_protocols=True)["pairs"][0] for both in pairwise(folders)]
    against_parent = compare(folders, across_protocols=True)
    changes = planned_stages[1:]
    return {
        "runs": against_parent["runs"],
        "protocol_difference": against_parent["protocol_difference"],
        "names": [stage.name for stage in planned_stages],
        "steps": [{"step": stage.name, **pair} for stage, pair in zip(changes, step_pairs, strict=True)],
        "against_parent": [
            {"step": stage.name, **pair} for stage, pair in zip(changes, against_parent["pairs"], strict=True)
        ],
    }
