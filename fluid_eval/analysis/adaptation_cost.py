"""What an adaptation costs and buys, step by step: the parent token by token, the adapted weights token by token, then
in parallel with drafts checked, then with drafts not checked. One sweep of those points, compared in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested

from ..common.spec import tables
from ..sweeps.grid import Plan, plan
from .compare import compare

UNVERIFIED = "dropping verification"
ANYWHERE = ("dtype", "device", "trust_remote_code")
"""What of a model's settings its parent shares; the others tell of the adapted one alone."""
SAMPLING = ("temperature", "top_p")
"""Settings that all decoders have, and must have alike."""


@dataclass(frozen=True)
class Step:
    """A run of the tax. name: what was done to the run before it.  settings: what tells it from the others."""

    name: str
    settings: Mapping[str, Any]


def steps(values: Nested, parent: str, method: str) -> list[Step]:
    """The runs of a tax, the parent's first. values: of the adapted model's run, its decoder's among them.

    What cannot be is left out: LLaDA's weights do not write token by token, and only FLUID checks its drafts.
    """
    decoder = values.get("decoder", {})
    shared = {f"decoder.{name}": decoder[name] for name in SAMPLING if name in decoder}
    own = {f"model.{name}": value for name, value in values["model"].items()}
    ar, parallel = {**own, "decoder.name": "ar", **shared}, {**own, "decoder.name": method, **shared}
    first = Step("parent, AR", {"model.path": parent, "decoder.name": "ar", **shared})
    if method == "llada":
        return [first, Step("adaptation, diffusion", parallel)]
    adapted = Step("adaptation", ar)
    if method == "nbdiff":
        return [first, adapted, Step("block diffusion", parallel)]
    checked = Step("verified parallel decoding", {**parallel, "decoder.verify": True})
    return [first, adapted, checked, Step(UNVERIFIED, {**parallel, "decoder.verify": False})]


def plan_tax(values: Nested, parent: str, method: str | None) -> tuple[list[Step], Plan]:
    """The steps and the sweep that makes them. method: what the model was adapted to.

    values: of the adapted model's run, as a spec file holds them.
    Raises ConfigError where the model was adapted to nothing, is its own parent, or a run is none.
    """
    values = tables(values)
    model = values["model"]["path"]
    asked = values.get("decoder", {}).get("name", method)
    if method is None or asked != method:
        is_what = f"was adapted to {method}" if method else "is a plain causal model"
        raise ConfigError(f"tax: {model} {is_what}; name a model that was adapted, and leave its decoder to it")
    found = steps(values, parent, method)
    shared = {name: value for name, value in values["model"].items() if name in ANYWHERE}
    base = {**values, "model": shared, "decoder": {**values.get("decoder", {}), "name": method}}
    planned = plan({**base, "sweep": {"point": [dict(step.settings) for step in found]}})
    if len(planned.points) < len(found):
        raise ConfigError(f"tax: {model} is its own parent; name with --parent the model it was adapted from")
    return found, planned


def measure(found: list[Step], folders: list[Path]) -> Nested:
    """Each step against the run before it, and what it all comes to against the parent, as `compare` tells pairs.

    All were asked alike but for a chat template of their own, which is told and forbids nothing.
    """
    pairs = [compare(both, across_protocols=True)["pairs"][0] for both in pairwise(folders)]
    whole = compare(folders, across_protocols=True)
    return {
        "runs": whole["runs"],
        "protocol_difference": whole["protocol_difference"],
        "names": [step.name for step in found],
        "steps": [{"step": step.name, **pair} for step, pair in zip(found[1:], pairs, strict=True)],
        "against_parent": [{"step": step.name, **pair} for step, pair in zip(found[1:], whole["pairs"], strict=True)],
    }
