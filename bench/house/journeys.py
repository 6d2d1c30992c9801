"""Which files do the work of one request of `run`, and of one speculative step: measured, by watching calls.

A request: `fluid-eval run` on the bundled tiny-fluid, with one document a task and with two. The files that are called
more often the second time are on the path of a request. What a run does once (settings, weights, environment) is not,
nor is what the engine calls: that is the second path.
A step: all calls below the engine's function for one forward of all active rows.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from .sources import ROOT

LOOP = "fluid_model/engine/loop.py"
STEP = ("_step", "step", "_round")
"""The engine's function for one forward of all active rows, by its names."""
HELPERS = {
    "fluid_model/common/": "files, settings by name, errors",
    "fluid_eval/common/": "the spec, statistics, tables, progress bars",
    "fluid_model/settings/": "settings",
    "fluid_model/tokens.py": "ids and texts",
    "fluid_model/engine/records.py": "the records that a request and an answer are",
    "fluid_eval/results/value_checks.py": "checks of stored values",
    "fluid_eval/results/stored_values.py": "checks of stored values",
    "fluid_eval/results/sample_records.py": "a sample as a line of JSON",
    "fluid_model/decoders/sampling.py": "arithmetic on logits",
    "fluid_model/forward/khead.py": "a head of two layers",
}
"""Files, or folders of files, that a reader of the path may take at their word, with the reason."""
ONE_STOP = ("fluid_model/forward/compiled/",)
"""Packages with one door, counted as one file."""


class FilesOnPath(NamedTuple):
    """Files in the order they are first called. work: helpers apart, packages with one door as one."""

    work: list[str]
    all: list[str]


def request_path() -> FilesOnPath:
    """Files on the path of one request of `run`. Runs tiny-fluid three times; the first fills caches."""
    counts = [_run(documents) for documents in (1, 1, 2)]
    return _path([file for file, calls in counts[2].items() if calls > counts[1][file]])


def step_path() -> FilesOnPath:
    """Files on the path of one speculative step of the decoder fluid, its prompts read before."""
    import fluid_model

    checkpoint = fluid_model.load(str(ROOT / "checkpoints" / "tiny-fluid"), device="cpu", dtype="float32")
    settings = fluid_model.FluidSettings(slot_budget=1000)
    return step_path_of(checkpoint, settings)


def step_path_of(checkpoint: Any, settings: Any) -> FilesOnPath:
    """The same of any checkpoint and decoder."""
    import fluid_model

    ids = tuple(checkpoint.tokenizer("Question: Tom has 3 apples")["input_ids"])
    engine = fluid_model.engine_for(checkpoint, settings, 2)
    requests = [fluid_model.Request(str(n), ids, max_new_tokens=24) for n in range(2)]
    with watched(lambda stack: any(file == LOOP and name in STEP for file, name in stack)) as calls:
        list(engine.generate(requests))
    if LOOP not in calls:
        raise RuntimeError(f"{LOOP} has none of the functions {', '.join(STEP)}")
    return _path(list(calls))


@contextlib.contextmanager
def watched(counts_below: Callable[[list[tuple[str, str]]], bool]) -> Iterator[Counter[str]]:
    """Counts calls of this project's functions by file, where the callers' (file, function) fit."""
    calls: Counter[str] = Counter()
    inside = f"{ROOT}{os.sep}"

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(inside) or not code.co_flags & 0x02:  # class bodies
            return
        stack, caller = list[tuple[str, str]](), frame
        while caller is not None:
            if caller.f_code.co_filename.startswith(inside):
                stack.append((caller.f_code.co_filename.removeprefix(inside), caller.f_code.co_name))
            caller = caller.f_back  # type: ignore[assignment]
        if counts_below(stack):
            calls[stack[0][0]] += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _run(documents: int) -> Counter[str]:
    """Calls of one run by file, down to the engine and not below. Raises RuntimeError if the run fails."""
    from fluid_eval.cli import EXIT_OK, EXIT_UNHEALTHY
    from fluid_eval.cli.main import main

    words = ["run", "--tasks", "mini_gsm8k", "--limit", str(documents), "--max-new-tokens", "16", "--device", "cpu"]
    words += ["--model", str(ROOT / "checkpoints" / "tiny-fluid"), "--set", "decoder.slot_budget=64"]
    errors = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        watched(lambda stack: not any(file == LOOP for file, _ in stack[1:])) as calls,
    ):
        code = main([*words, "--out", str(Path(folder) / "run")])
    if code not in (EXIT_OK, EXIT_UNHEALTHY):  # 16 tokens end few answers
        raise RuntimeError(f"the run ended with {code}: {errors.getvalue().strip()}")
    return calls


def _path(files: list[str]) -> FilesOnPath:
    own = [file for file in files if file.startswith(("fluid_model/", "fluid_eval/"))]
    work = [file for file in own if not file.startswith(tuple(HELPERS))]
    stops = [next((door for door in ONE_STOP if file.startswith(door)), file) for file in work]
    return FilesOnPath(list(dict.fromkeys(stops)), own)
