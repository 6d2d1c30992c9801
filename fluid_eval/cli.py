"""The `fluid-eval` command: parse, dispatch, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluid_model.errors import ConfigError, RunError

BUNDLED = "tiny-fluid"
"""The checkpoint a run takes if none is named."""
BUNDLED_TASKS = "mini_gsm8k,mini_math,mini_humaneval,mini_mmlu"
EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130

_FLAGS = {
    "tasks": "tasks",
    "model": "model.path",
    "decoder": "decoder.name",
    "dtype": "model.dtype",
    "device": "model.device",
    "data_dir": "data_dir",
    "limit": "limit",
    "num_fewshot": "num_fewshot",
    "max_new_tokens": "max_new_tokens",
    "batch_size": "batch_size",
    "engine": "engine.kind",
    "workers": "engine.workers",
    "ray_address": "engine.ray_address",
    "seed": "seed",
    "allow_code": "allow_code",
}
"""Flag -> setting of the spec."""
_SPEEDS = ("tokens_per_second", "tokens_per_forward", "forwards_per_answer")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="fluid-eval",
        description="Evaluate language models that write in parallel, beside the autoregressive ones they came from.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="run tasks with a model: table, run folder, result"))
    _add_sweep(commands.add_parser("sweep", help="many runs over settings: frontier of score against speed"))
    _add_trace(commands.add_parser("trace", help="how one answer comes about, forward by forward"))
    report = commands.add_parser("report", help="one self-contained HTML page from a run folder")
    report.add_argument("run", type=Path, help="run folder")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the run folder")
    doctor = commands.add_parser("doctor", help="versions, devices, data, code isolation; exit 1 if a run would fail")
    doctor.add_argument("--data-dir", default=None, metavar="DIR", help="folder with benchmark data")
    reproduce = commands.add_parser("reproduce", help="measure the claims of reports/claims.toml and compare")
    reproduce.add_argument("--data-dir", default=None, metavar="DIR", help="folder with benchmark data")
    reproduce.add_argument("--models-dir", default=None, metavar="DIR", help="folder with model folders")
    reproduce.add_argument("--out", type=Path, default=Path("runs/claims"), metavar="DIR", help="default: runs/claims")
    return top


def _add_run(run: argparse.ArgumentParser) -> None:
    where = _add_settings(run)
    where.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/TASKS-MODEL-DECODER-ID")
    where.add_argument("--resume", action="store_true", help="go on with a run folder")
    where.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    where = _add_settings(sweep)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder; default: sweeps/TASKS-MODEL-ID")
    where.add_argument("--resume", action="store_true", help="go on with a sweep's folder")
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    points = sweep.add_argument_group("which points")
    points.add_argument(
        "--sweep", action="append", default=[], metavar="A.B=C,D",
        help="e.g. decoder.confidence=0.5,0.9; several make a grid",
    )  # fmt: skip
    points.add_argument("--sample", type=_whole, metavar="N", help="that many points of the grid, at random")
    points.add_argument("--dry-run", action="store_true", help="say what it would take, from a few samples, and end")
    points.add_argument("--so-far", action="store_true", help="place points by what is answered, and end")
    points.add_argument("--stop-dominated", action="store_true", help="end points that others surely beat")
    points.add_argument(
        "--within", type=float, default=1.0, metavar="POINTS",
        help="name the fastest point at most that many below AR; default: 1",
    )  # fmt: skip
    points.add_argument("--by", default="tokens_per_second", choices=_SPEEDS, help="default: tokens_per_second")


def _add_settings(run: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What a run is, and where; returns the group of the latter."""
    run.add_argument("spec", nargs="?", type=Path, metavar="SPEC.toml", help="the settings below from a file")
    what = run.add_argument_group("what to run")
    what.add_argument("--tasks", metavar="A,B", help="gsm8k, math500, humaneval, mmlu, mmlu_SUBJECT, mini")
    what.add_argument(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="any Hugging Face causal LM, or a FLUID folder; default: the bundled tiny-fluid",
    )
    what.add_argument("--decoder", metavar="ar|fluid|nbdiff|llada", help="default: ar (fluid for the bundled model)")
    what.add_argument("--set", action="append", default=[], metavar="A.B=C", help="e.g. decoder.confidence=0.9")
    what.add_argument("--limit", type=_whole, metavar="N", help="first N documents of each task")
    what.add_argument("--num-fewshot", type=_whole, metavar="N", help="default: the task's own")
    what.add_argument("--max-new-tokens", type=_whole, metavar="N", help="default: the task's own")
    what.add_argument("--chat", action="store_true", help="prompts by the chat template; --set chat.system=TEXT, ...")
    what.add_argument("--seed", type=_whole, metavar="N", help="default: 1234")
    what.add_argument("--allow-code", action="store_const", const=True, help="agree to run code the model wrote")
    where = run.add_argument_group("where")
    where.add_argument("--data-dir", metavar="DIR", help="benchmark data; default: FLUID_DATA_DIR, else the hub")
    where.add_argument("--batch-size", type=_whole, metavar="N|auto", help="rows at a time")
    where.add_argument("--dtype", metavar="auto|float32|bfloat16")
    where.add_argument("--device", metavar="auto|cpu|cuda")
    where.add_argument("--engine", metavar="inline|ray", help="in this process (default), or Ray workers")
    where.add_argument("--workers", type=_whole, metavar="N", help="Ray workers; default: one a GPU")
    where.add_argument("--ray-address", metavar="HOST:PORT", help="default: RAY_ADDRESS, else a private cluster")
    return where


def _add_trace(trace: argparse.ArgumentParser) -> None:
    trace.add_argument("--model", metavar="PATH_OR_HUB_ID", help="default: the bundled tiny-fluid")
    trace.add_argument("--decoder", metavar="ar|fluid|nbdiff|llada", help="default: ar (fluid for the bundled model)")
    trace.add_argument("--prompt", required=True, metavar="TEXT", help="what the answer continues; \\n is a new line")
    trace.add_argument("--set", action="append", default=[], metavar="A.B=C", help="e.g. decoder.confidence=0.9")
    trace.add_argument("--max-new-tokens", type=_whole, default=64, metavar="N", help="default: 64")
    trace.add_argument("--markdown", action="store_true", help="a plain table instead of colours")


def _whole(text: str) -> int | str:
    """A whole number where it is one; the spec says what is wrong with anything else."""
    try:
        return int(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 bad input (one line says which), 130 interrupted."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars are enough
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # on a shared machine threads must not spin for one another
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return _COMMANDS[options.command](options)
    except ConfigError as error:
        print(f"fluid-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG
    except RunError as error:
        print(f"fluid-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("fluid-eval: interrupted; what is finished is stored, --resume goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; nothing to tell it
        return EXIT_FAILED


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """A spec's values: from its file, then flags, then --set."""
    from fluid_model.fields import assign, put, read_toml

    from .spec import tables

    values = read_toml(options.spec) if options.spec else {}
    if data_dir := os.environ.get("FLUID_DATA_DIR"):
        values.setdefault("data_dir", data_dir)
    values = tables(values)
    if options.model is None and "model" not in values:
        _take_bundled(values, options)
    if options.decoder and values.get("decoder", {}).get("name", options.decoder) != options.decoder:
        values["decoder"] = {}  # another decoder's settings mean nothing to this one
    for flag, name in _FLAGS.items():
        if (value := getattr(options, flag)) is not None:
            put(values, name, value)
    if options.chat:
        values.setdefault("chat", {})
    for setting in options.set:
        assign(values, setting)
    return values


def _run(options: argparse.Namespace) -> int:
    from .spec import build_spec

    spec = build_spec(_values(options))
    from . import run as job
    from .show import print_result

    folder = options.out or job.default_folder(spec)
    result = job.run(spec, folder, resume=options.resume)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result, folder)
    return EXIT_FAILED if result.get("lost") else EXIT_OK


def _sweep(options: argparse.Namespace) -> int:
    from .grid import plan, read_axis

    values = _values(options)
    sweep = values.setdefault("sweep", {})
    for text in options.sweep:
        name, axis = read_axis(text)
        sweep.setdefault("grid", {})[name] = axis
    if options.sample is not None:
        sweep["sample"] = options.sample
    planned = plan(values)
    from .run import default_folder
    from .show import print_plan, print_sweep
    from .sweep import Sweep

    first = default_folder(planned.points[0].spec).name.rsplit("-", 2)[0]
    folder = options.out or Path("sweeps") / f"{first}-{planned.id[:8]}"
    job = Sweep(planned, folder, resume=options.resume or options.so_far)
    if options.dry_run:
        print_plan(planned, job.estimate(), folder)
        return EXIT_OK
    if options.so_far:
        print_sweep(job.so_far(by=options.by, within=options.within), folder)
        return EXIT_OK
    result = job.work(stop_dominated=options.stop_dominated, by=options.by, within=options.within)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_sweep(result, folder)
    return EXIT_FAILED if result["lost"] else EXIT_OK


def _take_bundled(values: dict[str, Any], options: argparse.Namespace) -> None:
    """No model given: the bundled tiny-fluid, on the mini suite unless tasks are given. Says so."""
    from .paths import resource

    values["model"] = {"path": str(resource("checkpoints") / BUNDLED)}
    values.setdefault("decoder", {"name": "fluid"})
    if options.tasks is None and "tasks" not in values:
        values["tasks"] = BUNDLED_TASKS
        values["allow_code"] = True  # weights that come with this package, in a process of its own
    print(
        f"No model given: the bundled {BUNDLED}, 1.8M parameters, trained on the mini suite's\n"
        "kind of questions alone. For a real one, a 7B checkpoint for instance:\n"
        "fluid-eval run --tasks gsm8k,math500 --model FOLDER_OR_HUB_ID\n",
        file=sys.stderr,
    )


def _trace(options: argparse.Namespace) -> int:
    from fluid_model.fields import assign, put

    from .paths import resource
    from .spec import build_spec

    bundled = {"path": str(resource("checkpoints") / BUNDLED)}
    values: dict[str, Any] = {"tasks": "mini", "model": {"path": options.model} if options.model else bundled}
    put(values, "decoder.name", options.decoder or ("ar" if options.model else "fluid"))
    put(values, "max_new_tokens", options.max_new_tokens)
    for setting in options.set:
        assign(values, setting)
    spec = build_spec(values)
    from .trace import markdown, show, watch

    found, answer = watch(spec, options.prompt.replace("\\n", "\n"))
    if options.markdown:
        print(markdown(found))
    else:
        show(found, answer, spec.to_dict()["decoder"])
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    output = options.output or options.run / "report.html"
    write_report(options.run, output)
    print(output)
    return EXIT_OK


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    return EXIT_OK if examine(options.data_dir or os.environ.get("FLUID_DATA_DIR")) else EXIT_FAILED


def _reproduce(options: argparse.Namespace) -> int:
    from .claims import reproduce

    data_dir = options.data_dir or os.environ.get("FLUID_DATA_DIR")
    models_dir = options.models_dir or os.environ.get("FLUID_MODELS_DIR")
    reproduce(options.out, data_dir=data_dir, models_dir=models_dir)
    return EXIT_OK


_COMMANDS = {
    "run": _run,
    "sweep": _sweep,
    "trace": _trace,
    "report": _report,
    "doctor": _doctor,
    "reproduce": _reproduce,
}


if __name__ == "__main__":
    sys.exit(main())
