"""Speed on one device at a 7B model's size: `python -m bench.gpu [--json] [--quick] [--only PART]`, in one table.

Weights are random, of openPangu-Embedded-7B's shape, so what FLUID's drafts are worth is replayed from a recording of
tiny-fluid (`--record` makes it anew). Needs torch, transformers, peft and `fluid_model`. Clocks stay as they are found.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch
import transformers

from fluid_model import ConfigError
from fluid_model.checkpoints.checkpoint import pick_device

from .. import bars, clock, replay
from . import decode, lossless, scoring, training
from .plan import QUICK, Bench, GpuPlan, Measurements, build

PARTS = {"decode": decode, "lossless": lossless, "scoring": scoring, "training": training}
"""In this order, since training changes the model."""


def measure(plan: GpuPlan, only: Sequence[str]) -> Measurements:
    """All of it. Says so if this forward's logits are not those of transformers."""
    tape = replay.read(plan.vocabulary - 2)
    bandwidth = clock.copy_bandwidth(plan.device, plan.forwards)
    bounds = {what: bound for part in PARTS.values() for what, bound in part.BOUNDS.items()}
    bench = Bench(plan, build(plan), tape, bandwidth, Measurements(plan, bounds))
    try:
        bench.backbone.probe()
    except ConfigError as error:
        print(error, file=sys.stderr)
    bench.measurements.put("copy bandwidth, GB/s", 0, bandwidth / 1e9)
    bench.measurements.put("weights a forward reads, GB", 0, bench.read / 1e9)
    bench.measurements.put("slot budget", 0, bench.backbone.slot_budget)
    for name in only:
        PARTS[name].measure(bench)
    return bench.measurements


def setup_line(plan: GpuPlan) -> str:
    """What this is about, in one line."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    dtype = "float32" if plan.device.type == "cpu" else "bfloat16"
    return (
        f"{plan.hardware}, {versions}; random Llama of {plan.layers} layers, {plan.hidden} wide, {dtype}, "
        f"{plan.vocabulary:,} ids; rows of {plan.context} tokens, then {plan.tokens} written; clocks as found"
    )


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(each) for each in text.split(","))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a small model, one run: whether it works")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--only", choices=PARTS, action="append", help="what to measure; default: all")
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8, 32, 64), help="rows that write together")
    for name in ("layers", "hidden", "context", "tokens", "runs"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(GpuPlan, name)}")
    parser.add_argument("--record", action="store_true", help=f"write {replay.FILE.name} anew, from tiny-fluid")
    options = vars(parser.parse_args(arguments))
    if options["record"]:
        print(f"{replay.FILE}: {replay.write():,} bytes")
        return 0
    given = {name: value for name in GpuPlan.__dataclass_fields__ if isinstance(value := options.get(name), int)}
    sizes = {**(QUICK if options["quick"] else {}), **given}
    try:
        plan = GpuPlan(pick_device(options["device"]), options["concurrency"], **sizes)
    except ConfigError as error:
        parser.error(str(error))
    print(setup_line(plan), file=sys.stderr if options["json"] else sys.stdout)
    measured = measure(plan, options["only"] or list(PARTS))
    print(bars.render(measured.bars, as_json=True) if options["json"] else measured.table())
    return 0 if all(bar.ok is not False for bar in measured.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
