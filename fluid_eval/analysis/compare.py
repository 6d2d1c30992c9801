"""Finished runs compared on the documents they share: scores, speeds, and how sure the differences are. No torch.

Two answers are a pair if they answer the same document under the same prompt. What is hard for one run is mostly hard
for the other, so that the difference of pairs is surer than two intervals side by side let one think.

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
from .speed_ratios import Clocked, speeds

Doc = tuple[str, int]
"""Leaf task and document."""
_SAME = 1e-9
"""Scores and their means are rounded; differences up to this are none."""
SPOKEN = {"source", "about"}
"""Fields of a task's protocol that say where it is from, not what it is."""


class Asked(Protocol):
    """What tells how a run was asked."""

    @property
    def spec(self) -> Nested: ...

    @property
    def result(self) -> Nested: ...


@dataclass(frozen=True)
class Loaded:
    """A finished run folder. answers: by document, without those that were given up.  held: its speed repeats."""

    folder: str
    spec: Nested
    result: Nested
    environment: Nested
    answers: Mapping[Doc, Record]
    held: Sequence[Repeat] = ()


@dataclass(frozen=True)
class Pair:
    """The answers of two runs to the documents they share, by task of the base. left: keys of those not paired, why."""

    base: Loaded
    other: Loaded
    tasks: Mapping[str, Sequence[Doc]]
    left: Mapping[str, list[str]]


def compare(folders: Sequence[Path], *, across_protocols: bool = False, all_pairs: bool = False) -> Nested:
    """Every run against the first, as `fluid-eval compare --json` prints it (see docs/comparing.md).

    all_pairs: every two of them instead, the one named earlier as the base.
    A task counts by its first metric, all tasks together by the mean of the tasks' means.
    across_protocols: compare runs that were asked or read in different ways too; then a document is the same if its
    target is. Raises ConfigError if a folder holds no finished run, two runs share no document, or their protocols
    differ without leave.
    """
    if len(folders) < 2:
        raise ConfigError("compare needs two run folders at least: the base, and what is held against it")
    if twice := [
        folder for place, folder in enumerate(folders) if folder.resolve() in map(Path.resolve, folders[:place])
    ]:
        raise ConfigError(f"{twice[0]}: is named twice; name each run once")
    runs = [load(folder) for folder in folders]
    differences: list[str] = []
    sides = list(combinations(runs, 2)) if all_pairs else [(runs[0], other) for other in runs[1:]]
    for base, other in sides:
        found = protocol_difference(base, other)
        if found and not across_protocols:
            first, more = (
                shorten(found[0], 160, placeholder=" …"),
                f"; and {len(found) - 1} more" if len(found) > 1 else "",
            )
            raise ConfigError(
                f"{base.folder} and {other.folder} follow different protocols ({first}{more}): their scores do "
                "not compare; --across-protocols does it all the same, and tells every difference"
            )
        differences += [f"{base.folder} / {other.folder}: {line}" if len(runs) > 2 else line for line in found]
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
        "pairs": [measure(pair_up(base, other, across_protocols)) for base, other in sides],
    }


def load(folder: Path) -> Loaded:
    """Raises ConfigError if the folder holds no finished run, or not the samples of its result."""
    result, records = read_finished(folder, ("model", "decoder", "members", "lines"))
    environment = read_environment(folder / ENVIRONMENT)
    answers = {
        (record["task"], record["doc_id"]): record
        for record in records
        if "lost" not in record and record.get("scores")
    }
    return Loaded(str(folder), read_spec(folder / SPEC), result, environment, answers, speed_repeats.read(folder))


def protocol_difference(base: Asked, other: Asked) -> list[str]:
    """What was asked or read differently in the tasks both runs have, a line each: `gsm8k num_fewshot: 5 / 0`.

    By the protocols the runs tell; of a run from before there were any, by its spec and task versions.
    """
    ours, theirs = ((run.result.get("protocol") or {}).get("tasks", {}) for run in (base, other))
    if common := [task for task in ours if task in theirs]:
        return [line for task in common for line in _differing(f"{task} ", ours[task], theirs[task])]
    names = ("num_fewshot", "max_new_tokens", "chat", "profile", "extractor")
    unsaid = {field.name: field.default for field in fields(RunSpec) if field.name in names}
    found = _differing("", *({name: run.spec.get(name, unsaid[name]) for name in names} for run in (base, other)))
    versions = [run.result.get("task_versions", {}) for run in (base, other)]
    shared = versions[0].keys() & versions[1].keys()
    return found + _differing("version of ", *({task: one[task] for task in sorted(shared)} for one in versions))


def _differing(before: str, ours: Nested, theirs: Nested) -> list[str]:
    names = [name for name in {**ours, **theirs} if name not in SPOKEN and ours.get(name) != theirs.get(name)]
    found = []
    for name in names:
        one, two = ours.get(name), theirs.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differing(f"{before}{name} ", one, two)
        else:
            found.append(f"{before}{name}: {_words(one)} / {_words(two)}".replace("\n", "\\n"))
    return found


def _words(value: Any) -> str:
    """A setting in words: `none`, and an extractor's filters as `regex (regex_pattern #### x), take_first`."""
    if isinstance(value, str) and value.startswith('[{"function"'):
        steps = [dict(step) for step in json.loads(value)]
        names = [str(step.pop("function")) for step in steps]
        told = [", ".join(f"{name} {item}" for name, item in step.items()) for step in steps]
        return ", ".join(f"{name} ({rest})" if rest else name for name, rest in zip(names, told, strict=True))
    return "none" if value is None else str(value)


def pair_up(base: Loaded, other: Loaded, across_protocols: bool = False) -> Pair:
    """The documents two runs share. Raises ConfigError if there are none."""
    sign = "target" if across_protocols else "prompt_hash"
    both = base.answers.keys() & other.answers.keys()
    same = {doc for doc in both if base.answers[doc].get(sign) == other.answers[doc].get(sign)}
    left = {
        "only the base has": [base.answers[doc]["key"] for doc in base.answers if doc not in both],
        "only the other has": [other.answers[doc]["key"] for doc in other.answers if doc not in both],
        f"another {sign.partition('_')[0]}": [base.answers[d]["key"] for d in base.answers if d in both - same],
    }
    if not same:
        raise ConfigError(
            f"{base.folder} and {other.folder} share no document: "
            + ", ".join(f"{len(keys)} {why}" for why, keys in left.items() if keys)
        )
    tasks = {
        name: [doc for doc in base.answers if doc[0] in leaves and doc in same]
        for name, leaves in base.result["members"].items()
    }
    return Pair(base, other, {name: docs for name, docs in tasks.items() if docs}, left)


def measure(pair: Pair) -> Nested:
    """A pair's scores and speeds with 95% intervals, tests and flips."""
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
        "unpaired": pair.left,
        "unhealthy": {
            run.folder: [f"{g['gate']} in {g['task']}" for g in run.result.get("health", []) if not g["ok"]]
            for run in (pair.base, pair.other)
        },
    }


def entries(pair: Mapping[str, Any]) -> list[Nested]:
    """A pair's tasks, then all together where that says more than the only one."""
    return [*pair["tasks"], *([pair["all"]] if len(pair["tasks"]) > 1 else [])]


def surely(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Entries of a pair, tasks first, whose difference chance does not explain: its 95% interval holds no 0, and
    McNemar's test, where there is one, is below 5%: of all together as it is, of several tasks after Holm (1979), so
    that one task of twenty does not stand out by chance.
    """
    whole = entries(pair)[len(pair["tasks"]) :]
    return [entry for family in (pair["tasks"], whole) for entry in _beyond_chance(family)]


def _beyond_chance(family: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    tested = sorted(p for entry in family if (p := entry["mcnemar_p"]) is not None)
    held = next((p for place, p in enumerate(tested) if p * (len(tested) - place) >= 0.05), math.inf)
    return [
        entry
        for entry in family
        if (entry["difference"]["low"] > _SAME or entry["difference"]["high"] < -_SAME)
        and (entry["mcnemar_p"] is None or entry["mcnemar_p"] < held)
    ]


def worse(comparison: Mapping[str, Any], points: float) -> list[Mapping[str, Any]]:
    """Tasks, and all together, in which a run is surely worse than the base, and by more than `points` (%). Each with
    the run's folder as `other`.

    A drop that is smaller, or that chance may explain, is none: what could have been found is the entry's `mde`.
    """
    check_range("--fail-if-worse", points, 0, 100)
    found: list[Mapping[str, Any]] = []
    for pair in comparison["pairs"]:
        drops = [entry for entry in surely(pair) if -100 * entry["difference"]["mean"] > points + _SAME]
        found += [{**entry, "other": pair["other"]} for entry in drops]
    return found


@dataclass(frozen=True)
class _Scores:
    """Scores of both runs by a task's first metric, and the base's keys, one entry a document."""

    base: Sequence[float]
    other: Sequence[float]
    keys: Sequence[str]

    @property
    def differences(self) -> list[float]:
        return [b - a for a, b in zip(self.base, self.other, strict=True)]


def _scores(pair: Pair, docs: Sequence[Doc]) -> _Scores:
    base, other = (
        [float(next(iter(run.answers[doc]["scores"].values()))) for doc in docs] for run in (pair.base, pair.other)
    )
    return _Scores(base, other, [pair.base.answers[doc]["key"] for doc in docs])


def _compared(tasks: Sequence[_Scores]) -> Nested:
    """Scores, difference, tests and flips over tasks, each counting the same."""
    base, other = [task.base for task in tasks], [task.other for task in tasks]
    pairs = [(a, b, key) for t in tasks for a, b, key in zip(t.base, t.other, t.keys, strict=True)]
    gained, lost = ([key for a, b, key in pairs if (b - a) * sign > _SAME] for sign in (1, -1))
    counts = all(score in (0, 1) for a, b, _ in pairs for score in (a, b))
    n = len(pairs)
    # the mean over tasks varies as one task of this many documents, with this share of discordant ones, would
    even = len(tasks) ** 2 / math.fsum(1 / len(task.keys) for task in tasks)
    squares = math.fsum(math.fsum(d * d for d in task.differences) / len(task.keys) ** 2 for task in tasks)
    discordant = min(1.0, even * squares / len(tasks) ** 2)
    return {
        "n": n,
        "base": _told(mean_over_tasks(base)),
        "other": _told(mean_over_tasks(other)),
        "difference": _told(difference_over_tasks(base, other)),
        "mcnemar_p": mcnemar(len(lost), len(gained)) if counts else None,
        "b": len(lost),
        "c": len(gained),
        "mde": minimum_detectable(even, discordant),
        "flips": {"gained": gained, "lost": lost},
    }


def _told(found: Interval) -> Nested:
    return {name: value for name, value in asdict(found).items() if name != "n"}


def _speeds(pair: Pair, tasks: Sequence[str]) -> Nested:
    """See `speeds.speeds`; over these tasks."""
    sides = (
        Clocked(
            run.spec, run.environment, run.result, run.held, [[run.answers[d] for d in pair.tasks[t]] for t in tasks]
        )
        for run in (pair.base, pair.other)
    )
    return speeds(*sides)
