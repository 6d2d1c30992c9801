"""Finished runs compared in pairs on the documents they share: scores, speeds and their confidence intervals. No torch.

Two answers are a pair if they answer the same document under the same prompt. Documents are about equally hard for both
runs, so the interval of the paired difference is narrower than two separate intervals suggest.

    document   base   other   flip
    gsm8k/0    1      1
    gsm8k/1    1      0       lost      (b counts these)
    gsm8k/2    0      1       gained    (c counts these; McNemar's test compares b with c)

Legend: b, c documents that only the base, only the other run got right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.settings import check_range

from ..common.spec import RunSpec
from ..common.stats import Interval, difference_over_tasks, mcnemar, mean_over_tasks, minimum_detectable
from ..results import speed_repeats
from ..results.finished_runs import read_finished
from ..results.run_folder import ENVIRONMENT, SPEC, Record
from ..results.speed_repeats import Repeat
from ..results.stored_values import read_environment, read_spec
from ..sweeps import aup
from ..sweeps.points import as_point, method_of
from .speed_ratios import TimedRun, speeds

Doc = tuple[str, int]
"""Leaf task and document."""
_SAME = 1e-9
"""Scores and their means are rounded; differences up to this count as none."""
DESCRIPTIVE = {"source", "about", "partial"}
"""Fields of a task's protocol that describe it and do not change it."""


class HasProtocol(Protocol):
    """A run whose spec and result state its protocol."""

    @property
    def spec(self) -> Nested: ...

    @property
    def result(self) -> Nested: ...


@dataclass(frozen=True)
class FinishedRun:
    """A finished run folder. answers: by document, without failed samples.  repeats: its speed repeats."""

    folder: str
    spec: Nested
    result: Nested
    environment: Nested
    answers: Mapping[Doc, Record]
    repeats: Sequence[Repeat] = ()


@dataclass(frozen=True)
class RunPair:
    """Two runs and the documents they share, by task of the base. unpaired: reason -> keys of the others."""

    base: FinishedRun
    other: FinishedRun
    tasks: Mapping[str, Sequence[Doc]]
    unpaired: Mapping[str, list[str]]


def compare(folders: Sequence[Path], *, across_protocols: bool = False, all_pairs: bool = False) -> Nested:
    """Compare every run with the first, as `fluid-eval compare --json` prints it (see docs/comparing.md).

    all_pairs: compare every two of them instead, the one named earlier as the base.
    across_protocols: compare runs with different protocols too; then documents are the same if their targets are.
    A task counts by its first metric, all tasks together by the mean of the tasks' means.
    Raises ConfigError if a folder holds no finished run, two runs share no document, or protocols differ without
    `across_protocols`.
    """
    # 1) the runs and which of them make pairs
    if len(folders) < 2:
        raise ConfigError("compare needs at least two run folders: the base, and the runs to compare with it")
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise ConfigError(f"{folder}: is named twice; name each run once")
    runs = [load(folder) for folder in folders]
    sides = list(combinations(runs, 2)) if all_pairs else [(runs[0], other) for other in runs[1:]]
    # 2) protocols, which must agree
    differences: list[str] = []
    for base, other in sides:
        lines = protocol_difference(base, other)
        if lines and not across_protocols:
            first = shorten(lines[0], 160, placeholder=" …")
            more = f"; and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise ConfigError(
                f"{base.folder} and {other.folder} follow different protocols ({first}{more}): their scores do "
                "not compare; --across-protocols compares them all the same, and lists every difference"
            )
        differences += [f"{base.folder} / {other.folder}: {line}" if len(runs) > 2 else line for line in lines]
    # 3) scores and speeds of each pair
    return {
        "runs": [
            {
                "folder": run.folder,
                "model": run.result["model"],
                "decoder": run.result["decoder"],
                "protocol": (run.result.get("protocol") or {}).get("hash"),
            }
            for run in runs
        ],
        "protocol_difference": differences,
        "areas": _areas(runs),
        "pairs": [measure(pair_up(base, other, across_protocols)) for base, other in sides],
    }


def _areas(runs: Sequence[FinishedRun]) -> list[Nested]:
    """AUP of every model and decoder over the documents that all runs answered, see `sweeps.aup`."""
    common = set.intersection(*(set(run.answers) for run in runs))
    points = []
    for run in runs:
        owners = {leaf: task for task, leaves in run.result["members"].items() for leaf in leaves}
        decoder = run.result["decoder"]
        method = f"{Path(run.result['model'].rstrip('/')).name}, {method_of(decoder['name'], decoder.get('verify'))}"
        records = [record for doc, record in run.answers.items() if doc in common and doc[0] in owners]
        points.append((method, as_point(run.folder, {}, records, owners)))
    return aup.as_rows(aup.areas(points))


def load(folder: Path) -> FinishedRun:
    """Raises ConfigError if the folder holds no finished run, or not the samples of its result."""
    result, records = read_finished(folder, ("model", "decoder", "members", "lines"))
    environment = read_environment(folder / ENVIRONMENT)
    answers = {
        (record["task"], record["doc_id"]): record
        for record in records
        if "lost" not in record and record.get("scores")
    }
    return FinishedRun(str(folder), read_spec(folder / SPEC), result, environment, answers, speed_repeats.read(folder))


def protocol_difference(base: HasProtocol, other: HasProtocol) -> list[str]:
    """Differences of the protocols of the tasks that both runs have, a line each: `gsm8k num_fewshot: 5 / 0`.

    Runs older than protocols are compared by their specs and task versions.
    """
    # 1) by the protocols in the results
    ours, theirs = ((run.result.get("protocol") or {}).get("tasks", {}) for run in (base, other))
    if common := [task for task in ours if task in theirs]:
        return [line for task in common for line in _differences(f"{task} ", ours[task], theirs[task])]
    # 2) by settings; those missing in a spec have their defaults
    names = ("num_fewshot", "max_new_tokens", "chat", "profile", "extractor")
    defaults = {field.name: field.default for field in fields(RunSpec) if field.name in names}
    settings = [{name: run.spec.get(name, defaults[name]) for name in names} for run in (base, other)]
    # 3) by task versions
    versions = [run.result.get("task_versions", {}) for run in (base, other)]
    shared = sorted(versions[0].keys() & versions[1].keys())
    shared_versions = [{task: each[task] for task in shared} for each in versions]
    return _differences("", *settings) + _differences("version of ", *shared_versions)


def _differences(prefix: str, ours: Nested, theirs: Nested) -> list[str]:
    """A line for each field that differs, nested ones by their path."""
    lines = []
    for name in {**ours, **theirs}:
        one, two = ours.get(name), theirs.get(name)
        if name in DESCRIPTIVE or one == two:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            lines += _differences(f"{prefix}{name} ", one, two)
        else:
            sides = (
                "not recorded" if side.get("partial") and name not in side else _readable(side.get(name))
                for side in (ours, theirs)
            )
            lines.append(f"{prefix}{name}: {' / '.join(sides)}".replace("\n", "\\n"))
    return lines


def _readable(value: Any) -> str:
    """A setting for readers: `none`, and an extractor's filters as `regex (regex_pattern #### x), take_first`."""
    if isinstance(value, str) and value.startswith('[{"function"'):
        filters = []
        for step in map(dict, json.loads(value)):
            name = str(step.pop("function"))
            arguments = ", ".join(f"{key} {argument}" for key, argument in step.items())
            filters.append(f"{name} ({arguments})" if arguments else name)
        return ", ".join(filters)
    return "none" if value is None else str(value)


def pair_up(base: FinishedRun, other: FinishedRun, across_protocols: bool = False) -> RunPair:
    """The documents that two runs share. Raises ConfigError if there are none."""
    # 1) the same document: equal prompts, across protocols equal targets
    field = "target" if across_protocols else "prompt_hash"
    both = base.answers.keys() & other.answers.keys()
    same = {doc for doc in both if base.answers[doc].get(field) == other.answers[doc].get(field)}
    unpaired = {
        "only the base has": [base.answers[doc]["key"] for doc in base.answers if doc not in both],
        "only the other has": [other.answers[doc]["key"] for doc in other.answers if doc not in both],
        f"another {field.partition('_')[0]}": [base.answers[d]["key"] for d in base.answers if d in both - same],
    }
    if not same:
        raise ConfigError(
            f"{base.folder} and {other.folder} share no document: "
            + ", ".join(f"{len(keys)} {reason}" for reason, keys in unpaired.items() if keys)
        )
    # 2) by the base's tasks
    tasks = {
        name: [doc for doc in base.answers if doc[0] in leaves and doc in same]
        for name, leaves in base.result["members"].items()
    }
    return RunPair(base, other, {name: docs for name, docs in tasks.items() if docs}, unpaired)


def measure(pair: RunPair) -> Nested:
    """A pair's scores and speeds with 95% intervals, tests and flips; see docs/comparing.md."""
    tasks = {name: _scores(pair, docs) for name, docs in pair.tasks.items()}
    metrics = {name: next(iter(pair.base.answers[docs[0]]["scores"])) for name, docs in pair.tasks.items()}
    return {
        "base": pair.base.folder,
        "other": pair.other.folder,
        "tasks": [
            {"task": name, "metric": metrics[name], **_compared([scores]), "speed": _speeds(pair, [name])}
            for name, scores in tasks.items()
        ],
        "all": {"task": "all", "metric": None, **_compared(list(tasks.values()))},
        "speed": _speeds(pair, list(pair.tasks)),
        "unpaired": pair.unpaired,
        "unhealthy": {
            run.folder: [f"{g['gate']} in {g['task']}" for g in run.result.get("health", []) if not g["ok"]]
            for run in (pair.base, pair.other)
        },
    }


def entries(pair: Mapping[str, Any]) -> list[Nested]:
    """A pair's tasks, and all tasks together if there are several."""
    return [*pair["tasks"], *([pair["all"]] if len(pair["tasks"]) > 1 else [])]


def significant(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Entries of a pair, tasks first, whose difference is significant.

    The 95% interval excludes 0, and McNemar's p, where there is one, is below 5%. The p values of several tasks are
    corrected by Holm (1979), so that one task of twenty does not stand out by chance; that of all together is not.
    """
    together = entries(pair)[len(pair["tasks"]) :]
    return [entry for family in (pair["tasks"], together) for entry in _significant_in(family)]


def _significant_in(family: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Significant entries of a family of tests, by Holm: p values below the first that its step does not reject."""
    p_values = sorted(p for entry in family if (p := entry["mcnemar_p"]) is not None)
    first_kept = next((p for step, p in enumerate(p_values) if p * (len(p_values) - step) >= 0.05), math.inf)
    return [
        entry
        for entry in family
        if (entry["difference"]["low"] > _SAME or entry["difference"]["high"] < -_SAME)
        and (entry["mcnemar_p"] is None or entry["mcnemar_p"] < first_kept)
    ]


def worse(comparison: Mapping[str, Any], points: float) -> list[Mapping[str, Any]]:
    """Entries of a comparison in which a run is significantly worse than the base, by more than `points` (%).

    Each has the run's folder as `other`. Smaller drops may go undetected: see the entry's `mde`.
    """
    check_range("--fail-if-worse", points, 0, 100)
    drops: list[Mapping[str, Any]] = []
    for pair in comparison["pairs"]:
        for entry in significant(pair):
            if -100 * entry["difference"]["mean"] > points + _SAME:
                drops.append({**entry, "other": pair["other"]})
    return drops


@dataclass(frozen=True)
class _Scores:
    """Scores of both runs by a task's first metric, and the base's keys, an entry for each document."""

    base: Sequence[float]
    other: Sequence[float]
    keys: Sequence[str]

    @property
    def differences(self) -> list[float]:
        return [b - a for a, b in zip(self.base, self.other, strict=True)]


def _scores(pair: RunPair, docs: Sequence[Doc]) -> _Scores:
    """A task's scores over these documents."""
    base = [_first_score(pair.base.answers[doc]) for doc in docs]
    other = [_first_score(pair.other.answers[doc]) for doc in docs]
    return _Scores(base, other, [pair.base.answers[doc]["key"] for doc in docs])


def _first_score(record: Record) -> float:
    return float(next(iter(record["scores"].values())))


def _compared(tasks: Sequence[_Scores]) -> Nested:
    """Scores, difference, tests and flips over tasks of equal weight."""
    # 1) flips: documents that only one of the runs got right
    pairs = [(a, b, key) for t in tasks for a, b, key in zip(t.base, t.other, t.keys, strict=True)]
    gained = [key for a, b, key in pairs if b - a > _SAME]
    lost = [key for a, b, key in pairs if a - b > _SAME]
    is_binary = all(score in (0, 1) for a, b, _ in pairs for score in (a, b))
    # 2) the smallest detectable difference. The mean over tasks has the variance of one task with `effective`
    #    documents, of which the share `discordant` flips.
    effective = len(tasks) ** 2 / math.fsum(1 / len(task.keys) for task in tasks)
    squares = math.fsum(math.fsum(d * d for d in task.differences) / len(task.keys) ** 2 for task in tasks)
    discordant = min(1.0, effective * squares / len(tasks) ** 2)
    # 3) means and their difference
    base = [task.base for task in tasks]
    other = [task.other for task in tasks]
    return {
        "n": len(pairs),
        "base": _mean_and_ends(mean_over_tasks(base)),
        "other": _mean_and_ends(mean_over_tasks(other)),
        "difference": _mean_and_ends(difference_over_tasks(base, other)),
        "mcnemar_p": mcnemar(len(lost), len(gained)) if is_binary else None,
        "b": len(lost),
        "c": len(gained),
        "mde": minimum_detectable(effective, discordant),
        "flips": {"gained": gained, "lost": lost},
    }


def _mean_and_ends(interval: Interval) -> Nested:
    return {name: value for name, value in asdict(interval).items() if name != "n"}


def _speeds(pair: RunPair, tasks: Sequence[str]) -> Nested:
    """Speed ratios over these tasks, see `speed_ratios.speeds`."""
    documents = [pair.tasks[task] for task in tasks]
    return speeds(_timed(pair.base, documents), _timed(pair.other, documents))


def _timed(run: FinishedRun, tasks: Sequence[Sequence[Doc]]) -> TimedRun:
    records = [[run.answers[doc] for doc in docs] for docs in tasks]
    return TimedRun(run.spec, run.environment, run.result, run.repeats, records)
