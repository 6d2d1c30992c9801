"""How runs were set up: protocol, environment, settings, and in what several of them differ."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..terminal import number
from .stored import Nested, Stored, flat


def environment(run: Stored) -> dict[str, Any]:
    """Rows of a run's environment table."""
    values = run.environment
    git, engine = values.get("git", {}), values.get("engine", {})
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[git.get("dirty")]
    memory = values.get("memory_bytes")
    rows = {
        "folder": run.folder.name,
        "spec": run.spec["id"],
        "started": run.result["started"].replace("T", " ").replace("+00:00", " UTC"),
        "took": duration(run.result["wall_seconds"]),
        "command": shlex.join(values.get("command", [])),
        "commit": f"{git['commit']}, {state}" if git.get("commit") else None,
        "device": engine.get("device"),
        "dtype": engine.get("dtype"),
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


def versions(run: Stored) -> Nested:
    """Versions of what it ran with."""
    return dict(run.environment.get("versions", {}))


def settings(run: Stored) -> Nested:
    """All settings of a run's spec, as asked; None is the default of the task or the machine."""
    return {name: found for name, found in flat(run.spec) if name != "id"}


def setups(runs: Sequence[Stored]) -> list[tuple[str, Nested, list[list[str]]]]:
    """Tables of the page: a title, what all runs have in common, and rows of what they differ in, a cell a run."""
    found = []
    for title, of in (("Where it ran", environment), ("Versions", versions), ("Settings", settings)):
        each = [{name: value(one) for name, one in of(run).items()} for run in runs]
        names = list(dict.fromkeys(name for rows in each for name in rows))
        cells = {name: [rows.get(name, "–") for rows in each] for name in names}
        alike = {name: those[0] for name, those in cells.items() if len(set(those)) == 1}
        found.append((title, alike, [[name, *those] for name, those in cells.items() if name not in alike]))
    return found


def grouped(runs: Sequence[Stored], name: str) -> list[tuple[list[Stored], Any]]:
    """Runs by what their results hold under a name, those with the same together."""
    found: list[tuple[list[Stored], Any]] = []
    for run in runs:
        held = run.result.get(name)
        same = next((those for those, other in found if other == held), None)
        if same is None:
            found.append(([run], held))
        else:
            same.append(run)
    return found


def protocol(run: Stored) -> dict[str, dict[str, str]]:
    """Settings of a run's protocol by task, what all tasks have in common first; empty where none was recorded."""
    kept: Mapping[str, Nested] = (run.result.get("protocol") or {}).get("tasks", {})
    tasks = {task: {name: value(found) for name, found in settings.items()} for task, settings in kept.items()}
    if len(tasks) < 2:
        return tasks
    common = dict(set.intersection(*({*settings.items()} for settings in tasks.values())))
    first = next(iter(tasks.values()))
    own = {
        task: {name: found for name, found in settings.items() if name not in common}
        for task, settings in tasks.items()
    }
    alike = {"all tasks": {name: found for name, found in first.items() if name in common}} if common else {}
    return alike | {task: settings for task, settings in own.items() if settings}


def value(found: Any) -> str:
    """A setting as a reader expects it."""
    if found is None or found == "":
        return "–"
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, Mapping):
        return "; ".join(f"{name}: {value(one)}" for name, one in found.items()) or "–"
    if isinstance(found, list):
        return ", ".join(map(repr if any(str(one) != str(one).strip() for one in found) else str, found)) or "–"
    return f"{found:g}" if isinstance(found, float) else str(found)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as many as say something."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
