"""`fluid-eval run`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .options import add_settings, add_speed_repeats, add_track, exit_code, spec_of

HELP = "evaluate a model on tasks: scores, speeds, run folder"
EXAMPLE = "fluid-eval run --tasks gsm8k,mbpp --model FOLDER_OR_HUB_ID"


def add(run: argparse.ArgumentParser) -> None:
    where = add_settings(run)
    where.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/TASKS-MODEL-DECODER-ID")
    where.add_argument("--resume", action="store_true", help="continue an interrupted run")
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    add_speed_repeats(where)
    add_track(where)
    other = run.add_argument_group("another program writes the answers")
    other.add_argument(
        "--backend", metavar="NAME", help="a model of lm-eval's: hf, vllm, sglang, local-completions, ..."
    )  # fmt: skip
    other.add_argument("--backend-args", metavar="K=V,K=V", help="its arguments, as lm_eval --model_args has them")


def main(options: argparse.Namespace) -> int:
    from ..output import tracking

    tracking.check_tracker(options.track)
    spec = spec_of(options)
    from ..output.terminal_results import print_result
    from ..results.run_folder import RESULT
    from ..running import job as job

    folder = options.out or job.default_folder(spec)
    is_again = options.out is None and (folder / RESULT).exists()  # the folder's name holds the spec's id
    if is_again and not options.resume:
        print("this run is finished: its stored result follows; --out DIR runs it again", file=sys.stderr)
    result = job.run(spec, folder, resume=options.resume or is_again, speed_repeats=options.speed_repeats)
    if options.track is not None:
        tracking.track_run(options.track, folder, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result, folder)
    return exit_code(result.get("lost", {}), result["health"])
