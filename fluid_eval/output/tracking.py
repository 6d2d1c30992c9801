"""Finished runs and sweeps in an experiment tracker, by the tracker's own library: wandb, mlflow, tensorboard, trackio.

A run is logged once, when it is finished: settings, result table, speeds, health. A sweep is one tracked run for each
point. Where they go is the libraries' own affair: WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR. Unknown numbers
are left out, never logged as 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import read_json

from ..results.run_folder import SPEC
from .report.runs import flat

Tracker = Literal["wandb", "mlflow", "tensorboard", "trackio"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
PROJECT = "fluid-eval"
"""Project or experiment that runs are logged under."""
_COSTS = ("tokens", "forwards", "seconds", "tokens_per_forward", "tokens_per_second", "slots_per_token", "n")
_PARAMETERS_AT_ONCE = 100
"""Of one call of mlflow."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets of a run.

    name: the run folder's, or the point's.  group: the sweep's id; None of a single run.
    settings: by dotted name, with the run's id.  numbers: by TASK/METRIC,FILTER and the like.
    folder: where tensorboard's files go.
    """

    name: str
    group: str | None
    settings: Mapping[str, Any]
    numbers: Mapping[str, float]
    folder: Path


def check_tracker(name: str | None) -> None:
    """Raise ConfigError if a tracker's library is missing, with the command that installs it."""
    if name is not None and find_spec(name) is None:
        raise ConfigError(f"track={name}: {name} is not installed; pip install 'fluid-eval[{name}]'")


def track_run(tracker: Tracker, folder: Path, result: Mapping[str, Any]) -> None:
    """Log a finished run. Raises ConfigError if the library is missing or refuses."""
    numbers = {name: value for line in result["lines"] for name, value in _of_line(line)}
    numbers |= {f"health/{g['task']}/{g['gate']}": g["share"] for g in result.get("health", [])}
    _log(tracker, [TrackedRun(folder.name, None, _settings(folder), numbers, folder)])


def track_sweep(tracker: Tracker, folder: Path, result: Mapping[str, Any]) -> None:
    """Log a finished sweep, a tracked run for each point. Raises ConfigError if the library is missing or refuses."""
    runs = []
    for point in result["points"]:
        numbers = {"n": point["n"], "on_frontier": float(point["name"] in result["frontier"])}
        for name in ("score", "tokens_per_second", "tokens_per_forward", "forwards_per_answer"):
            for end in ("mean", "low", "high"):
                numbers[name if end == "mean" else f"{name}/{end}"] = (point[name] or {}).get(end)
        own = [gate for gate in result.get("health", []) if gate["point"] == point["name"]]
        numbers |= {f"health/{g['task']}/{g['gate']}": g["share"] for g in own}
        run = folder / point["folder"]
        runs.append(TrackedRun(point["name"], result["id"], _settings(run), _known(numbers), run))
    _log(tracker, runs)


def _settings(folder: Path) -> dict[str, Any]:
    """A run's settings by dotted name, its id among them."""
    return dict(flat(read_json(folder / SPEC)))


def _of_line(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers of a row of the result table."""
    name = f"{line['task']}/{line['metric']},{line['filter']}"
    score = line["score"] if line["score"] is not None else line.get("value")
    values = {name: score, f"{name}/low": line["low"], f"{name}/high": line["high"]}
    values |= {f"{line['task']}/{cost}": line.get(cost) for cost in _COSTS}
    yield from _known(values).items()


def _known(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values, as floats."""
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _log(tracker: Tracker, runs: Sequence[TrackedRun]) -> None:
    """Log runs by one of the libraries."""
    check_tracker(tracker)
    for run in runs:
        try:
            _WRITERS[tracker](run)
        except Exception as error:  # of any type: the library's own
            raise ConfigError(f"track={tracker}: {type(error).__name__}: {error}; the run itself is stored") from error


def _to_wandb(run: TrackedRun) -> None:
    import wandb

    with wandb.init(
        project=PROJECT, name=run.name, group=run.group, config=dict(run.settings), reinit="finish_previous"
    ) as opened:  # fmt: skip
        opened.log(dict(run.numbers))


def _to_mlflow(run: TrackedRun) -> None:
    import mlflow

    mlflow.set_experiment(PROJECT)
    settings = list({name: str(value)[:500] for name, value in run.settings.items()}.items())
    with mlflow.start_run(run_name=run.name):
        for start in range(0, len(settings), _PARAMETERS_AT_ONCE):
            mlflow.log_params(dict(settings[start : start + _PARAMETERS_AT_ONCE]))
        mlflow.log_metrics({re.sub(r"[^\w\-. /]", "_", name): value for name, value in run.numbers.items()})
        if run.group is not None:
            mlflow.set_tag("sweep", run.group)


def _to_tensorboard(run: TrackedRun) -> None:
    from torch.utils.tensorboard import SummaryWriter

    rows = "".join(f"| {name} | {value} |\n" for name, value in run.settings.items())
    with SummaryWriter(str(run.folder / "tensorboard")) as writer:
        writer.add_text("settings", f"| setting | |\n|---|---|\n{rows}")
        for name, value in run.numbers.items():
            writer.add_scalar(name, value, 0)


def _to_trackio(run: TrackedRun) -> None:
    import trackio

    trackio.init(project=PROJECT, name=run.name, group=run.group, config=dict(run.settings))
    trackio.log(dict(run.numbers))
    trackio.finish()


_WRITERS: Mapping[Tracker, Callable[[TrackedRun], None]] = {
    "wandb": _to_wandb, "mlflow": _to_mlflow, "tensorboard": _to_tensorboard, "trackio": _to_trackio,
}  # fmt: skip
