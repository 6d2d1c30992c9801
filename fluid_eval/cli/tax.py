"""`fluid-eval tax`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import add_settings, add_speed_repeats, exit_code, say_which_model, values_of

HELP = "cost of an adaptation: AR parent, adapted AR, verified, unverified"
EXAMPLE = "fluid-eval tax --parent AR_MODEL --model ADAPTED_MODEL"
PARENT = "tiny-ar"
"""The AR parent of the bundled model."""


def add(tax: argparse.ArgumentParser) -> None:
    where = add_settings(tax)
    tax.add_argument("--parent", metavar="PATH_OR_HUB_ID", help="the AR model it was adapted from")
    where.add_argument("--out", type=Path, metavar="DIR", help="sweep folder; default: sweeps/tax-TASKS-MODEL-ID")
    where.add_argument("--resume", action="store_true", help="continue an interrupted run")
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    add_speed_repeats(where)


def main(options: argparse.Namespace) -> int:
    from fluid_model.checkpoints.checkpoint import describe
    from fluid_model.common.errors import ConfigError

    from ..analysis.adaptation_cost import UNVERIFIED, measure, plan_stages
    from ..common.bundled import resolved
    from ..common.paths import resource

    # 1) the adapted model and its parent
    values = values_of(options)
    if options.parent is None and options.model is not None:
        raise ConfigError("tax: name the model it was adapted from: --parent FOLDER_OR_HUB_ID")
    parent = resolved(options.parent or str(resource("checkpoints") / PARENT))
    model = values["model"]
    trusted = model.get("trust_remote_code", False)
    info = describe(model["path"], model.get("method"), trust_remote_code=trusted, base=model.get("base"))
    if adapted := describe(parent, trust_remote_code=trusted).method:
        raise ConfigError(f"tax: the parent {parent} was itself adapted to {adapted}; name the AR model before that")
    # 2) a sweep of the stages
    stages, planned = plan_stages(values, parent, info.method)
    say_which_model(options)
    from ..output.terminal_pairs import print_tax
    from ..results.run_folder import POINTS
    from ..running.job import default_folder
    from ..sweeps.sweep import Sweep

    first = default_folder(planned.points[-1].spec).name.rsplit("-", 2)[0]
    folder = options.out or Path("sweeps") / f"tax-{first}-{planned.id[:8]}"
    swept = Sweep(planned, folder, resume=options.resume).work(speed_repeats=options.speed_repeats)
    # 3) compare them
    result = measure(stages, [folder / POINTS / point.spec.id for point in planned.points])
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_tax(result, folder)
    lossless = {point.name for stage, point in zip(stages, planned.points, strict=True) if stage.name != UNVERIFIED}
    return exit_code(swept["lost"], [gate for gate in swept.get("health", []) if gate["point"] in lossless])
