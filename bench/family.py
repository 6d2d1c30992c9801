"""The bundled family on the mini suite: `python -m bench.family` measures it and writes docs/tiny-family.md.

python -m bench.family [--checkpoints DIR] [--limit N] [--runs DIR] [--out FILE] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_eval.running import job as job
from fluid_model.checkpoints.manifest import TRAINING_FILE
from fluid_model.engine.records import KINDS
from fluid_model.train.origin import cpu_name

from . import bars
from .bars import Bar

TASKS = ("mini_gsm8k", "mini_math", "mini_humaneval", "mini_mmlu")
METRICS = {"mini_gsm8k": "exact_match,strict-match", "mini_math": "math_verify,none"}
"""Metric and filter of a task; the others have one only."""
SCORES_FILE = "family.json"


@dataclass(frozen=True)
class FamilySystem:
    """A row of the table: a checkpoint and its decoder."""

    label: str
    checkpoint: str
    decoder: dict[str, Any]


PUBLISHED = "tiny-fluid, verified, published sampler"
SYSTEMS = (
    FamilySystem("tiny-ar", "tiny-ar", {"name": "ar"}),
    FamilySystem("tiny-fluid, verified", "tiny-fluid", {"name": "fluid", "slot_budget": 1000}),
    FamilySystem("tiny-fluid, verified, slots priced here", "tiny-fluid", {"name": "fluid"}),
    FamilySystem(PUBLISHED, "tiny-fluid", {"name": "fluid", "rounds": "reference"}),
    FamilySystem(
        "tiny-fluid, verified, published sampler, stride 4 at least",
        "tiny-fluid",
        {"name": "fluid", "rounds": "reference", "min_horizon": 4},
    ),
    FamilySystem("tiny-fluid, as AR", "tiny-fluid", {"name": "ar"}),
    FamilySystem("tiny-fluid, unverified, γ 0.9", "tiny-fluid", {"name": "fluid", "verify": False}),
    FamilySystem("tiny-fluid, unverified, γ 0.5", "tiny-fluid", {"name": "fluid", "verify": False, "confidence": 0.5}),
    FamilySystem("tiny-nbdiff, threshold 0.9", "tiny-nbdiff", {"name": "nbdiff", "small_blocks": 4}),
    FamilySystem("tiny-nbdiff, one a pass", "tiny-nbdiff", {"name": "nbdiff", "small_blocks": 4, "confidence": None}),
    FamilySystem("tiny-nbdiff, whole blocks", "tiny-nbdiff", {"name": "nbdiff", "small_blocks": 1}),
    FamilySystem("tiny-llada, one a step", "tiny-llada", {"name": "llada", "gen_length": 96, "block_length": 4}),
    FamilySystem(
        "tiny-llada, two a step", "tiny-llada", {"name": "llada", "gen_length": 96, "block_length": 4, "steps": 48}
    ),
)


def measure(system: FamilySystem, checkpoints: Path, runs: Path, limit: int | None) -> dict[str, Any]:
    """Scores and costs of one system, by task."""
    values = {
        "tasks": list(TASKS), "model": str(checkpoints / system.checkpoint), "decoder": system.decoder,
        "allow_unsafe_code": True,
    }  # fmt: skip
    spec = build_spec(values if limit is None else {**values, "limit": limit})
    result = job.run(spec, runs / spec.id, resume=True)
    return {
        "wall_seconds": result["wall_seconds"],
        "tasks": {line["task"]: line for line in result["lines"] if is_main(line)},
        "levels": {line["task"]: line for line in result["parts"] if is_main(line)},
        "accepted": mean_accepted_length(runs / spec.id),
        "slot_budget": result["conditions"]["slot_budget"],
    }


def is_main(line: dict[str, Any]) -> bool:
    """Whether a line of a result is the metric a task is judged by."""
    name = f"{line['metric']},{line['filter']}"
    return next((wanted == name for task, wanted in METRICS.items() if line["task"].startswith(task)), True)


def mean_accepted_length(folder: Path) -> float | None:
    """Mean accepted length over all steps of a run; None for decoders without draft tokens."""
    lengths: list[int] = []
    with (folder / "samples.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            lengths += (json.loads(line).get("trace") or {}).get("accepted") or []
    return sum(lengths) / len(lengths) if lengths else None


def training_seconds(checkpoint: Path) -> float:
    """Wall time of all stages of a checkpoint, without its parent's."""
    record = json.loads((checkpoint / TRAINING_FILE).read_text(encoding="utf-8"))
    return float(record["seconds"] + sum(stage["seconds"] for stage in record.get("before", ())))


def mean_score(result: dict[str, Any]) -> float:
    """Mean over the tasks, in percent."""
    scores = [float(line["score"]) for line in result["tasks"].values()]
    return 100 * math.fsum(scores) / len(scores)


def interval(line: dict[str, Any]) -> str:
    """A score and its 95% interval, in percent."""
    return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def table(results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> str:
    """Systems by tasks: scores, costs, training time."""
    head = ["", *TASKS, "mean", "tokens/forward", "stride", "wall, s", "trained in, min"]
    rows = []
    for system in (system for system in SYSTEMS if system.label in results):
        result = results[system.label]
        written = [line for line in result["tasks"].values() if line["tokens_per_forward"] is not None]
        speed = sum(line["tokens"] for line in written) / sum(line["forwards"] for line in written)
        rows.append(
            [
                system.label, *(interval(result["tasks"][task]) for task in TASKS), f"{mean_score(result):.1f}",
                f"{speed:.2f}", "" if result["accepted"] is None else f"{result['accepted']:.2f}",
                f"{result['wall_seconds']:.0f}", f"{seconds[system.checkpoint] / 60:.0f}",
            ]
        )  # fmt: skip
    return bars.table(head, rows)


def cost_table(results: dict[str, dict[str, Any]]) -> str:
    """Systems by their costs on the generative tasks."""
    head = ["", "tokens", *KINDS, "forwards", "tokens/forward", "slots/token", "slot budget", "tokens/s"]
    rows = []
    for label, result in results.items():
        written = [line for line in result["tasks"].values() if line["tokens_per_forward"] is not None]
        tokens, forwards, slots = (sum(line[name] for line in written) for name in ("tokens", "forwards", "slots"))
        seconds = math.fsum(line["seconds"] for line in written)
        kinds = [sum(line["forwards_by_kind"].get(kind, 0) for line in written) for kind in KINDS]
        counts = [f"{count:,}" if count else "" for count in (tokens, *kinds, forwards)]
        budget = ", ".join(map(str, result["slot_budget"] or ()))
        costs = [f"{tokens / forwards:.2f}", f"{slots / tokens:.1f}", budget, f"{tokens / seconds:,.0f}"]
        rows.append([label, *counts, *costs])
    return bars.table(head, rows)


def level_table(results: dict[str, dict[str, Any]]) -> str:
    """Systems by levels of each task."""
    names = sorted(next(iter(results.values()))["levels"])
    head = ["", *(name.removeprefix("mini_") for name in names)]
    rows = [
        [label, *(f"{100 * result['levels'][name]['score']:.1f}" for name in names)]
        for label, result in results.items()
    ]
    return bars.table(head, rows)


def bars_of(results: dict[str, dict[str, Any]]) -> list[Bar]:
    """The family's bars, measured."""
    parent, child, llada = results["tiny-ar"], results["tiny-fluid, verified"], results["tiny-llada, one a step"]
    loose = results["tiny-fluid, unverified, γ 0.5"]
    easiest, mean = 100 * parent["levels"]["mini_gsm8k_1"]["score"], mean_score(parent)
    loss = mean - mean_score(child)
    loss_unverified = mean_score(child) - mean_score(loose)
    accepted = results[PUBLISHED]["accepted"]
    measured = (
        ("tiny-ar on mini_gsm8k_1, %", easiest, "at least 95", easiest >= 95),
        ("tiny-ar, mean of the suite, %", mean, "75 to 95", 75 <= mean <= 95),
        ("tiny-fluid verified, points below its parent", loss, "at most 1", loss <= 1),
        ("tiny-fluid, mean accepted stride, published sampler", accepted, "at least 4", accepted >= 4),
        ("points lost unverified at γ 0.5", loss_unverified, "above 0", loss_unverified > 0),
        ("tiny-llada, mean of the suite, %", mean_score(llada), "at least 50", mean_score(llada) >= 50),
    )
    return [Bar(name, round(value, 2), bar, ok) for name, value, bar, ok in measured]


PAGE = """# The tiny family

Written by `python -m bench.family --out docs/tiny-family.md`: the checkpoints of `checkpoints/` on the mini suite,
210 questions a task, greedy. Score in % with its 95% interval; tokens/forward over the three tasks that write text,
every forward counted; stride: mean accepted length; wall: the whole run, on {hardware}; trained in: all stages of the
checkpoint itself, its parent apart. "Verified" has a slot budget of 1,000, as on a device where slots cost little;
"slots priced here" follows the measured time of forwards on this machine: where drafts do not pay it feeds the bonus
token alone, as AR does. The published sampler is the public code's, uncached (strides of 1 at least) and cached (4 at
least): versions (c) and (b) of [decoders.md](decoders.md). tiny-fluid and tiny-nbdiff were adapted on the same rows
for the same number of steps (`recipes/`). "As AR" is tiny-fluid decoded one token per forward: verified decoding
writes its text. tiny-llada gives up causal attention. From tiny-ar, with the others' steps, it reached 10% only, so
it starts from tiny-nbdiff, keeps the next-token shift and has 4,500 steps. It writes blocks of 4 from left to right;
blocks of 2 and 8 were tried too ([log](log/2026-11-29-tiny-llada-by-blocks.md)).

{table}
{absent}
## Cost

Over the three tasks with generated text: tokens before the end of their answers, forwards by kind, slots fed (prompts
included), the slot budget in force, tokens a second of the engine's time (one run: a figure of this
machine in that hour, without an interval).

{costs}

## By level

Level 1 is the easiest.

{levels}

## Bars

{bars}
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the page. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.family", description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=resource("checkpoints"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--runs", type=Path, help="run folders to go on with; default: a temporary one")
    parser.add_argument("--out", type=Path, help="page to write, and family.json beside the checkpoints")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    runs = options.runs or Path(tempfile.mkdtemp(prefix="family-"))
    known = [system for system in SYSTEMS if (options.checkpoints / system.checkpoint).is_dir()]
    results = {}
    for system in known:
        print(system.label, file=sys.stderr)
        results[system.label] = measure(system, options.checkpoints, runs, options.limit)
    seconds = {system.checkpoint: training_seconds(options.checkpoints / system.checkpoint) for system in known}
    checked = bars_of(results) if {"tiny-ar", "tiny-fluid", "tiny-llada"} <= set(seconds) else []
    bar_lines = bars.render(checked, as_json=False)
    text = table(results, seconds)
    print(bars.render(checked, as_json=True) if options.json else f"{text}\n\n{bar_lines}")
    if options.out:
        absent = sorted({system.checkpoint for system in SYSTEMS} - set(seconds))
        note = f"\nNot trained yet: {', '.join(absent)}.\n" if absent else ""
        page = PAGE.format(
            table=text,
            costs=cost_table(results),
            levels=level_table(results),
            bars=bar_lines,
            hardware=cpu_name(),
            absent=note,
        )
        options.out.write_text(page, encoding="utf-8")
        by_system = {label: scores(result) for label, result in results.items()}
        if options.limit is None:  # a later training is compared with scores of the full tasks only
            (options.checkpoints / SCORES_FILE).write_text(json.dumps(by_system, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(bar.ok for bar in checked) else 1


def scores(result: dict[str, Any]) -> dict[str, list[float]]:
    """Score and interval of each task, for a later training to be compared with."""
    return {task: [round(line[name], 6) for name in ("score", "low", "high")] for task, line in result["tasks"].items()}


if __name__ == "__main__":
    sys.exit(main())
