"""Setup of the runs in a report: protocol, environment, settings, and their differences."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ...results.sample_records import UNKNOWN
from ..terminal import number
from .runs import Nested, ReportRun, flat


def environment(run: ReportRun) -> dict[str, Any]:
    """Rows of a run's environment table."""
    values = run.environment
    git, engine = values.get("git", {}), values.get("engine", {})
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[git.get("dirty")]
    memory = values.get("memory_bytes")
    rows = {
        "folder": run.folder.name,
        "spec": run.spec["id"],
        "started": (run.result["started"] or UNKNOWN).replace("T", " ").replace("+00:00", " UTC"),
        "took": duration(run.result["wall_seconds"]),
        "read from": ", ".join(values.get("imported", {}).get("files", [])) or None,
        "command": shlex.join(values.get("command", [])),
        "commit": f"{git['commit']}, {state}" if git.get("commit") else None,
        "device": engine.get("device"),
        "dtype": engine.get("dtype"),
        "quantization": run.result.get("quantization"),
        "forward": engine.get("forward_kind") or engine.get("forward"),
        "workers": engine.get("workers"),
        "threads per worker": engine.get("threads"),
        "parameters": number(engine.get("parameters")),
        "code isolation": values.get("isolation"),
        "python": values.get("python"),
        "platform": values.get("platform"),
        "processor": values.get("processor"),
        "CPUs": values.get("cpus"),
        "memory": memory and f"{memory / 2**30:.1f} GiB",
    }
    for data in values.get("data", []):
        rows[f"data {data['dataset']} {data['split']}"] = f"{data['rows']:,} rows, sha256 {data['sha256'][:16]}…"
    return rows


def versions(run: ReportRun) -> Nested:
    """Versions of the libraries it ran with."""
    return dict(run.environment.get("versions", {}))


def settings(run: ReportRun) -> Nested:
    """All settings of a run's spec; None is the default of the task or the machine."""
    return {name: setting for name, setting in flat(run.spec) if name != "id"}


def setups(runs: Sequence[ReportRun]) -> list[tuple[str, Nested, list[list[str]]]]:
    """Tables of the page: title, values that all runs share, and rows of those that differ, a cell for each run."""
    tables = []
    for title, of in (("Where it ran", environment), ("Versions", versions), ("Settings", settings)):
        each = [{name: value(one) for name, one in of(run).items()} for run in runs]
        names = list(dict.fromkeys(name for rows in each for name in rows))
        cells = {name: [rows.get(name, "–") for rows in each] for name in names}
        alike = {name: those[0] for name, those in cells.items() if len(set(those)) == 1}
        tables.append((title, alike, [[name, *those] for name, those in cells.items() if name not in alike]))
    return tables


def grouped(runs: Sequence[ReportRun], name: str) -> list[tuple[list[ReportRun], Any]]:
    """Runs with equal values in their results together: [(runs, value)]. name: key of the result."""
    groups: list[tuple[list[ReportRun], Any]] = []
    for run in runs:
        shared = run.result.get(name)
        same = next((members for members, other in groups if other == shared), None)
        if same is None:
            groups.append(([run], shared))
        else:
            same.append(run)
    return groups


def protocol(run: ReportRun) -> dict[str, dict[str, str]]:
    """Settings of a run's protocol by task, those that all tasks share first. Empty if none was recorded."""
    stored: Mapping[str, Nested] = (run.result.get("protocol") or {}).get("tasks", {})
    tasks = {task: {name: value(setting) for name, setting in fields.items()} for task, fields in stored.items()}
    if len(tasks) < 2:
        return tasks
    common = dict(set.intersection(*({*fields.items()} for fields in tasks.values())))
    first = next(iter(tasks.values()))
    own = {
        task: {name: setting for name, setting in fields.items() if name not in common}
        for task, fields in tasks.items()
    }
    alike = {"all tasks": {name: setting for name, setting in first.items() if name in common}} if common else {}
    return alike | {task: fields for task, fields in own.items() if fields}


def value(setting: Any) -> str:
    """A setting as text: yes and no, lists with commas, a dash for None."""
    if setting is None or setting == "":
        return "–"
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, Mapping):
        return "; ".join(f"{name}: {value(one)}" for name, one in setting.items()) or "–"
    if isinstance(setting, list):
        return ", ".join(map(repr if any(str(one) != str(one).strip() for one in setting) else str, setting)) or "–"
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def duration(seconds: float | None) -> str:
    """A duration in hours and minutes, minutes and seconds, or seconds."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
