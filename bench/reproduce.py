"""Trains a bundled checkpoint again and compares: `python -m bench.reproduce NAME [--short]`.

Full: the unchanged recipe, from the bundled parent. Held-out figures must agree with training.json within TOLERANCE,
and the mini suite's scores with the intervals of checkpoints/family.json. Short (minutes): the same chain with a few
steps from random weights; losses must fall, and verified FLUID text must be its own AR text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_eval.results.run_folder import read_samples
from fluid_eval.running import job as job
from fluid_model import ConfigError
from fluid_model.checkpoints.manifest import TRAINING_FILE
from fluid_model.common.fields import assign
from fluid_model.common.files import read_toml
from fluid_model.train.chain import build_chain

from .bars import Bar, render
from .family import SCORES_FILE, SYSTEMS, measure

NAMES = ("tiny-ar", "tiny-fluid", "tiny-nbdiff", "tiny-llada")
TOLERANCE = {"loss": 0.05, "l_ar": 0.05, "l_diff": 0.05, "accepted": 0.1, "drift": 0.25}
"""Allowed difference of held-out figures, relative: threads and machines round differently."""
SHORT_ROWS, ROWS, SEED = 4000, 400_000, 1
SHORT = (
    "optim.steps=60",
    "optim.batch_size=4",
    "optim.measure_every=30",
    "optim.report_every=10",
    "optim.save_every=30",
)


def rows(build: Path, count: int) -> Path:
    """The mini suite's training rows."""
    file = build / f"mini-train-{count}.jsonl"
    if not file.is_file():
        maker = resource("tasks") / "mini" / "suite.py"
        options = ("--count", str(count), "--seed", str(SEED), "--out", str(file))
        subprocess.run([sys.executable, str(maker), *options], check=True)
    return file


def train(name: str, out: Path, data: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """Train a recipe into `out`; an interrupted attempt is resumed.

    Raises ConfigError if `out` holds another recipe's result.
    """
    from fluid_model.train.run import train_chain

    values = read_toml(resource("recipes") / f"{name}.toml")
    for setting in (*settings, f"out={out}", f'data.files=["{data}"]'):
        assign(values, setting)
    return train_chain(build_chain(values), resume=True)


def full(name: str, build: Path) -> list[Bar]:
    """The unchanged recipe, compared with the bundled checkpoint's training.json and scores."""
    bundled, out = resource("checkpoints"), build / name
    parent = () if name == "tiny-ar" else (f"model.parent={bundled / 'tiny-ar'}",)
    trained = train(name, out, rows(build, ROWS), parent)
    before = json.loads((bundled / name / TRAINING_FILE).read_text(encoding="utf-8"))
    checked = []
    for new, old in zip([*trained["before"], trained], [*before["before"], before], strict=True):
        for key, allowed in TOLERANCE.items():
            if key in old["final"]:
                was, now = old["final"][key], new["final"][key]
                label = f"{new['recipe']['stage']}: {key}"
                checked.append(Bar(label, now, f"{was:.4f} ± {allowed:.0%}", abs(now - was) <= allowed * abs(was)))
    scores = json.loads((bundled / SCORES_FILE).read_text(encoding="utf-8"))
    system = next(system for system in SYSTEMS if system.checkpoint == name)
    for task, line in measure(system, build, build / "runs", None)["tasks"].items():
        score, low, high = scores[system.label][task]
        checked.append(
            Bar(task, line["score"], f"{score:.3f} in [{low:.3f}, {high:.3f}]", low <= line["score"] <= high)
        )
    return checked


def short(name: str, build: Path) -> list[Bar]:
    """The same chain with a few steps, from random weights."""
    data = rows(build, SHORT_ROWS)
    build = Path(tempfile.mkdtemp(prefix="short-", dir=build))  # no earlier result there is resumed
    parent = build / "short-tiny-ar"
    first = train("tiny-ar", parent, data, (*SHORT, "next.optim.steps=20"))
    stages = [*first["before"], first]
    if name != "tiny-ar":
        fewer = ("next.optim.steps=20",) if name == "tiny-fluid" else ()
        last = train(name, build / f"short-{name}", data, (*SHORT, f"model.parent={parent}", *fewer))
        stages += [*last["before"], last]
    checked = []
    for stage in stages:
        losses = [entry["loss"] for entry in stage["history"] if "loss" in entry]
        start, end = float(losses[0]), float(losses[-1])
        checked.append(Bar(f"{stage['recipe']['stage']}: last loss", end, f"below the first, {start:.3f}", end < start))
    if name == "tiny-fluid":
        texts = [answers(build / f"short-{name}", build / "runs", decoder) for decoder in ("ar", "fluid")]
        same = sum(texts[0][key] == texts[1][key] for key in texts[0])
        checked.append(Bar("verified texts equal to AR's", same, f"all {len(texts[0])}", same == len(texts[0])))
    return checked


def answers(model: Path, runs: Path, decoder: str) -> dict[int, str]:
    """A checkpoint's answers to a few questions, by document."""
    values = {"tasks": ["mini_gsm8k_1"], "model": str(model), "decoder": decoder, "limit": 8, "max_new_tokens": 48}
    spec = build_spec(values)
    job.run(spec, runs / spec.id, resume=True)
    return {record["doc_id"]: record["output"] for record in read_samples(runs / spec.id)}


def main(arguments: list[str] | None = None) -> int:
    """Train, compare, print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--short", action="store_true", help="a few steps from random weights")
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder of data, trainings and runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.build.mkdir(parents=True, exist_ok=True)
    try:
        checked = (short if options.short else full)(options.name, options.build)
    except ConfigError as error:
        print(f"bench.reproduce: {error}; --build names another folder", file=sys.stderr)
        return 2
    if options.json:
        print(render(checked, as_json=True))
    else:
        width = max(len(bar.name) for bar in checked)
        for bar in checked:
            print(f"{bar.name:{width}}  {bar.measured:>10.4g}  {bar.bar}  {'ok' if bar.ok else 'NO'}")
    return 0 if all(bar.ok for bar in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
