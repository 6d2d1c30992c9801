"""The one call into lm-eval: which tasks there are, what they ask, and what lm-eval says of the answers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError
from fluid_model.settings import answer_slots

from ..common.paths import resource
from ..common.spec import RunSpec
from ..results.run_folder import Record
from ..sandbox import passing
from . import profiles

if TYPE_CHECKING:
    from lm_eval.api.model import LM

Tasks = dict[str, Any]
"""What lm-eval's TaskManager.load gives: tasks, groups, group_map."""
Asked = list[Any]
"""What lm-eval asks: its Instances."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's own answer length for a task that sets none."""


def check_names(names: tuple[str, ...]) -> None:
    """Raise ConfigError, naming the known tasks, if one is not among them."""
    manager = _catalogue()
    parts = ("mmlu_", "mini_")  # their groups say enough
    main = sorted(set(manager.all_groups) | {n for n in manager.all_subtasks if not n.startswith(parts)})
    for name in names:
        if name not in manager.all_groups and name not in manager.all_subtasks:
            known = ", ".join(main)
            raise ConfigError(f"task {name!r} is unknown; known: {known}, and each subject as mmlu_SUBJECT")


def known_tasks() -> set[str]:
    """Names of all tasks and groups."""
    manager = _catalogue()
    return {*manager.all_groups, *manager.all_subtasks}


def inside(name: str) -> set[str]:
    """Names of all that a group holds, groups in it and theirs too; none for a task."""
    return _inside(_catalogue(), name)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Names, each once, without those that a group among them holds."""
    names, manager = dict.fromkeys(names), _catalogue()
    held = {member for name in names for member in _inside(manager, name)}
    return tuple(name for name in names if name not in held)


def _inside(manager: Any, name: str) -> set[str]:
    entry = manager.task_index[name]
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if not isinstance(members, (list, set)):
        return set()
    return {found for member in members for found in (member, *_inside(manager, member))}


def unsafe_names(names: tuple[str, ...]) -> list[str]:
    """Tasks and groups that run model-written code."""
    manager = _catalogue()

    def unsafe(name: str) -> bool:
        return bool((manager.task_index[name].cfg or {}).get("unsafe_code"))

    return [name for name in names if any(map(unsafe, {name} | _inside(manager, name)))]


def writes(name: str) -> bool:
    """Whether a task, or one of a group's, has answers written rather than scored by likelihood."""
    manager = _catalogue()
    kinds = ((manager.task_index[one].cfg or {}).get("output_type") for one in {name} | _inside(manager, name))
    return "generate_until" in kinds


@contextmanager
def _templates() -> Iterator[None]:
    """What goes wrong with a template as ConfigError."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ConfigError(f"a task's template cannot be rendered: {error}") from error


@_templates()
def load_tasks(spec: RunSpec) -> Tasks:
    """Build the tasks with the spec's settings, their data loaded. Raises ConfigError where data are missing."""
    manager = _manager(spec.data_dir)
    _apply_profile(manager, spec)
    try:
        loaded: Tasks = dict(manager.load(list(spec.tasks)))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"tasks={','.join(spec.tasks)}: {error}") from error
    for task in loaded["tasks"].values():
        if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=spec.num_fewshot)
        if spec.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": spec.max_new_tokens}, update=True)
    profiles.check_chat(spec, loaded["tasks"])
    return loaded


def _apply_profile(manager: Any, spec: RunSpec) -> None:
    """Have the manager build tasks as the run's profile wants them."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, changed in profiles.changes(spec, manager.all_subtasks).items():
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path, resolve_func=True)
        for table in ("generation_kwargs", "fewshot_config", "metadata"):
            if table in changed:
                changed = {**changed, table: {**(config.get(table) or {}), **changed[table]}}
        manager.task_index[name] = replace(entry, yaml_path=None, cfg={**config, **changed})


def check_settings(spec: RunSpec, tasks: Tasks, window: int) -> None:
    """Raise ConfigError if an answer leaves no room for its prompt or cannot be laid out by the decoder, shots are too
    many, a task wants to sample, or has no place for thinking.
    """
    thinking = spec.chat is not None and spec.chat.thinking
    for name, task in tasks["tasks"].items():
        shots, examples = task.get_config("num_fewshot") or 0, len(task.sampler.df)
        if shots > examples:
            raise ConfigError(f"num_fewshot={shots}: task {name} has {examples} examples to draw from")
        settings = task.get_config("generation_kwargs") or {}
        length = settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)
        writes = task.get_config("output_type") == "generate_until"
        if writes and (needed := answer_slots(spec.decoder, length)) >= window:
            canvas = f", written on a canvas of {needed}," if needed > length else ""
            raise ConfigError(
                f"max_new_tokens={length} of task {name}{canvas} leaves no room for a prompt in the model's window of "
                f"{window}; pass a smaller --max-new-tokens{' or --set decoder.gen_length' if canvas else ''}"
            )
        if thinking and not writes:
            raise ConfigError(
                f"chat.thinking=true: task {name} writes nothing, it compares likelihoods; run it without"
            )
        if thinking and task.get_config("gen_prefix"):
            raise ConfigError(f"chat.thinking=true: task {name} begins the answer itself; run it without thinking")
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ConfigError(f"task {name} asks for sampling; here the decoder decides: --set decoder.temperature=T")


def limit_for(spec: RunSpec, share: float) -> float | None:
    """lm-eval's limit for that share of a run's documents: a number of them, or a share where the run takes all."""
    if share >= 1:
        return spec.limit
    return share if spec.limit is None else math.ceil(share * spec.limit)


@_templates()
def requests(spec: RunSpec, tasks: Tasks, lm: LM) -> Asked:
    """All that lm-eval's loop will ask. Raises ConfigError for a template that cannot be rendered."""
    asked: Asked = []
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=spec.seed)  # tasks built before draw on
        task.build_all_requests(
            limit=spec.limit,
            system_instruction=spec.chat.system if spec.chat else None,
            apply_chat_template=spec.chat is not None,
            fewshot_as_multiturn=spec.chat is not None and spec.chat.multiturn,
            chat_template=lm.apply_chat_template if spec.chat else None,
            tokenizer_name=lm.tokenizer_name if spec.chat else "",
        )
        asked += task.instances
    return asked


@_templates()
def evaluate(spec: RunSpec, tasks: Tasks, lm: LM, share: float = 1.0) -> dict[str, Any]:
    """lm-eval's own loop: build requests, have them answered by `lm`, filter and score. Returns its results.

    share: of each task's documents, the first ones.  Raises ConfigError for a template that cannot be rendered.
    """
    import numpy as np
    from lm_eval import evaluator

    random.seed(spec.seed)
    np.random.seed(spec.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=spec.seed)  # tasks evaluated before draw on
    found = evaluator.evaluate(
        lm=lm,
        task_dict=tasks,
        limit=limit_for(spec, share),
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=True,
        apply_chat_template=spec.chat is not None,
        fewshot_as_multiturn=spec.chat is not None and spec.chat.multiturn,
        system_instruction=spec.chat.system if spec.chat else None,
    )
    assert found is not None, "rank 0 always gets results"
    return dict(found)


def runs_code(task: Any) -> bool:
    """Whether a task's answers are programs."""
    return bool(task.get_config("unsafe_code"))


def _programs(task: Any, doc: dict[str, Any], texts: list[str]) -> list[str]:
    """What answers to a document are as programs, by the task's own filter."""
    (made,) = task.get_config("filter_list")[0]["filter"][0]["filter_fn"]([texts], [doc])
    return list(made)


def begin_judging(tasks: Tasks, name: str, doc: dict[str, Any], text: str) -> None:
    """Have an answer judged while others are written, where it is a program."""
    task = tasks["tasks"][name]
    if runs_code(task):
        passing.begin(doc, _programs(task, doc, [text]))


def scored_records(tasks: Tasks, results: Mapping[str, Any], samples: Mapping[str, Record]) -> list[Record]:
    """Samples with lm-eval's scores, the answers its filters extracted and the targets, in task and document order."""
    records = []
    for name, examples in results["samples"].items():
        extract = (tasks["tasks"][name].get_config("metadata") or {}).get("extract")
        merged: dict[int, Record] = {}
        for example in examples:
            key = f"{name}/{example['doc_id']}"
            record = merged.setdefault(example["doc_id"], {**samples[key], "extracted": {}, "scores": {}})
            record["target"] = _target(tasks["tasks"][name], example)
            record["extracted"][example["filter"]] = _extracted(example, record, extract)
            if runs_code(tasks["tasks"][name]):
                judged = passing.verdicts(example["doc"], example["filtered_resps"][0])
                record["verdicts"] = [{"result": v.told, "isolation": v.isolation} for v in judged]
            for metric in example["metrics"]:
                score = 0.0 if record.get("broken") else float(example[metric])  # else nobody's answer may be right
                record["scores"][f"{metric},{example['filter']}"] = score
        records += [merged[doc_id] for doc_id in sorted(merged)]
    return records


def members(tasks: Tasks, name: str) -> list[str]:
    """Leaf tasks of a task or group."""
    if name in tasks["tasks"]:
        return [name]
    return [task.task_name for task in tasks["groups"][name].get_all_tasks()]


def minerva_answer(output: str) -> str:
    """The answer that Minerva's exact match compares, for the task files that use it."""
    from lm_eval.tasks.minerva_math.utils import get_unnormalized_answer, normalize_final_answer

    return str(normalize_final_answer(get_unnormalized_answer(output)))


def boxed_answer(output: str) -> str:
    """What stands in an answer's last box, normalised as Minerva does; empty without one."""
    from lm_eval.tasks.minerva_math.utils import last_boxed_only_string, normalize_final_answer, remove_boxed

    boxed = last_boxed_only_string(output)
    return str(normalize_final_answer(remove_boxed(boxed))) if boxed else ""


def boxed_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, int]:
    """Scores of a MATH answer by its last box (exact_match) and as a whole (math_verify), for profiles."""
    from lm_eval.tasks.minerva_math.utils import is_equiv, process_results

    answer = boxed_answer(results[0])
    verified = int(process_results(doc, results)["math_verify"])
    return {"exact_match": int(bool(answer) and is_equiv(answer, doc["answer"])), "math_verify": verified}


def versions(tasks: Tasks) -> dict[str, Any]:
    """lm-eval's version of each leaf task."""
    return {name: task.VERSION for name, task in tasks["tasks"].items()}


@cache
def _catalogue() -> Any:
    """What tasks there are, read once; tasks are built by managers of their own."""
    return _manager(None)


def _manager(data_dir: str | None) -> Any:
    """Our own task folder only: indexing lm-eval's takes ten seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    _confine_templates()
    return TaskManager(include_path=str(resource("tasks")), include_defaults=False, metadata={"data_dir": data_dir})


def _confine_templates() -> None:
    """Let what lm-eval renders reach nothing but the document: a profile's templates may be somebody else's."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        confined = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        confined.filters |= utils.env.filters
        utils.env = confined


def _target(task: Any, example: Mapping[str, Any]) -> str:
    target = example["target"]
    choices = task.doc_to_choice(example["doc"]) if task.get_config("doc_to_choice") else None
    return str(choices[target] if choices and isinstance(target, int) else target)


def _extracted(example: Mapping[str, Any], record: Record, extract: Callable[[str], str] | None) -> str:
    """The answer that was scored: the task's own extraction, a choice, or what the filter left."""
    if extract is not None:
        return extract(record["output"])
    if "choices" in record:
        return str(record["output"])
    (left,) = example["filtered_resps"]
    return str(left[0] if isinstance(left, list) else left)
