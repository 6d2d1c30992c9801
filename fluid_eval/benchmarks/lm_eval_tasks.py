"""lm-eval's tasks: building them, running lm-eval's evaluation loop over our model, reading back its scores.

One document of `gsm8k`, from task file to stored sample:

    tasks/gsm8k/gsm8k.yaml           doc_to_text: "Question: {{question}}\\nAnswer:", num_fewshot: 5, until, filters
    load_tasks, build requests       one Instance: arguments = (prompt, {"until": ["Question:", …], …})
                                     prompt = "Question: … #### 5\\n\\n…Question: Janet's ducks …\\nAnswer:"
    lm.generate_until (FluidLM)      " She sells 9 eggs … #### 18"                            `running.lm_eval_model`
    filter "strict-match"            "18"
    metric exact_match               1.0
    scored_records                   the record with "extracted": {"strict-match": "18", "flexible-extract": "18"},
                                     "target": "… #### 18", "scores": {"exact_match,strict-match": 1.0, …}
"""

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
"""Result of lm-eval's TaskManager.load: tasks, groups, group_map."""
Asked = list[Any]
"""Requests of lm-eval: a list of its Instances."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's own answer length for a task that sets none."""


def check_names(names: tuple[str, ...]) -> None:
    """Raise ConfigError, naming the known tasks, if one is not among them."""
    manager = _catalogue()
    parts = ("mmlu_", "mini_")  # the error names their groups only
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
    """Names of all tasks and groups inside a group, at any depth; none for a task."""
    return _inside(_catalogue(), name)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Names, each once, without those inside a group among them."""
    names = dict.fromkeys(names)
    manager = _catalogue()
    nested = {member for name in names for member in _inside(manager, name)}
    return tuple(name for name in names if name not in nested)


def _inside(manager: Any, name: str) -> set[str]:
    entry = manager.task_index[name]
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if not isinstance(members, (list, set)):
        return set()
    return set(members).union(*(_inside(manager, member) for member in members))


def unsafe_names(names: tuple[str, ...]) -> list[str]:
    """Tasks and groups that run model-written code."""
    manager = _catalogue()

    def unsafe(name: str) -> bool:
        return bool((manager.task_index[name].cfg or {}).get("unsafe_code"))

    return [name for name in names if any(map(unsafe, {name} | _inside(manager, name)))]


def writes(name: str) -> bool:
    """Whether a task, or one inside a group, generates answers rather than comparing likelihoods."""
    manager = _catalogue()
    kinds = ((manager.task_index[one].cfg or {}).get("output_type") for one in {name} | _inside(manager, name))
    return "generate_until" in kinds


@contextmanager
def _templates() -> Iterator[None]:
    """Template errors as ConfigError."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise ConfigError(f"a task's template cannot be rendered: {error}") from error


@_templates()
def load_tasks(spec: RunSpec) -> Tasks:
    """Build the tasks with the spec's settings and load their data. Raises ConfigError where data are missing."""
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
    """Put the fields that the run's profile changes into the manager's task entries."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, changed in profiles.changes(spec, manager.all_subtasks).items():
        entry = manager.task_index[name]
        config = load_yaml(entry.yaml_path, resolve_func=True)
        for table in ("generation_kwargs", "fewshot_config", "metadata"):
            if table in changed:
                changed = {**changed, table: {**(config.get(table) or {}), **changed[table]}}
        manager.task_index[name] = replace(entry, yaml_path=None, cfg={**config, **changed})


def check_settings(spec: RunSpec, tasks: Tasks, window: int) -> None:
    """Raise ConfigError if a task cannot be answered under these settings. window: the model's, in tokens.

    Checked: the number of shots, the answer's length against the window and the decoder's canvas, thinking, sampling.
    """
    thinking = spec.chat is not None and spec.chat.thinking
    for name, task in tasks["tasks"].items():
        # 1) few-shot examples
        shots = task.get_config("num_fewshot") or 0
        examples = len(task.sampler.df)
        if shots > examples:
            raise ConfigError(f"num_fewshot={shots}: task {name} has {examples} examples to draw from")
        # 2) the answer's length
        settings = task.get_config("generation_kwargs") or {}
        length = settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)
        generates = task.get_config("output_type") == "generate_until"
        if generates and (needed := answer_slots(spec.decoder, length)) >= window:
            canvas = f", written on a canvas of {needed}," if needed > length else ""
            raise ConfigError(
                f"max_new_tokens={length} of task {name}{canvas} leaves no room for a prompt in the model's window of "
                f"{window}; pass a smaller --max-new-tokens{' or --set decoder.gen_length' if canvas else ''}"
            )
        # 3) thinking and sampling
        if thinking and not generates:
            raise ConfigError(
                f"chat.thinking=true: task {name} writes nothing, it compares likelihoods; run it without"
            )
        if thinking and task.get_config("gen_prefix"):
            raise ConfigError(f"chat.thinking=true: task {name} begins the answer itself; run it without thinking")
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ConfigError(f"task {name} asks for sampling; here the decoder decides: --set decoder.temperature=T")


def limit_for(spec: RunSpec, share: float) -> float | None:
    """lm-eval's `limit` for a share of a run's documents: a count, or a fraction where the run has no limit."""
    if share >= 1:
        return spec.limit
    return share if spec.limit is None else math.ceil(share * spec.limit)


@_templates()
def requests(spec: RunSpec, tasks: Tasks, lm: LM) -> Asked:
    """All requests of lm-eval's evaluation loop. Raises ConfigError for a template that cannot be rendered."""
    asked: Asked = []
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=spec.seed)  # built before, a task has advanced its generator
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
    """lm-eval's evaluation loop: build requests, answer them with `lm`, filter, score. Returns its results.

    share: fraction of each task's documents, from the first.
    Raises ConfigError for a template that cannot be rendered.
    """
    import numpy as np
    from lm_eval import evaluator

    random.seed(spec.seed)
    np.random.seed(spec.seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=spec.seed)  # evaluated before, a task has advanced its generator
    results = evaluator.evaluate(
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
    assert results is not None, "rank 0 always gets results"
    return dict(results)


def runs_code(task: Any) -> bool:
    """Whether a task's answers are programs."""
    return bool(task.get_config("unsafe_code"))


def _programs(task: Any, doc: dict[str, Any], texts: list[str]) -> list[str]:
    """Answers to a document as programs: prompt and completion joined by the task's own filter."""
    (programs,) = task.get_config("filter_list")[0]["filter"][0]["filter_fn"]([texts], [doc])
    return list(programs)


def begin_judging(tasks: Tasks, name: str, doc: dict[str, Any], text: str) -> None:
    """Start the tests of an answer that is a program, while other answers are generated."""
    task = tasks["tasks"][name]
    if runs_code(task):
        passing.begin(doc, _programs(task, doc, [text]))


def scored_records(tasks: Tasks, results: Mapping[str, Any], samples: Mapping[str, Record]) -> list[Record]:
    """Stored samples with target, extracted answers and scores from lm-eval, in task and document order.

    results: of `evaluate`; lm-eval lists a document once a filter.  samples: stored records by key.
    """
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
                judged = passing.outcomes(example["doc"], example["filtered_resps"][0])
                record["verdicts"] = [{"result": v.result, "isolation": v.isolation} for v in judged]
            for metric in example["metrics"]:
                # a non-finite row has no answer, and must not be scored as if it had chosen one
                score = 0.0 if record.get("broken") else float(example[metric])
                record["scores"][f"{metric},{example['filter']}"] = score
        records += [merged[doc_id] for doc_id in sorted(merged)]
    return records


def members(tasks: Tasks, name: str) -> list[str]:
    """Leaf tasks of a task or group."""
    if name in tasks["tasks"]:
        return [name]
    return [task.task_name for task in tasks["groups"][name].get_all_tasks()]


def minerva_answer(output: str) -> str:
    """The answer that Minerva's exact match compares; named in task files."""
    from lm_eval.tasks.minerva_math.utils import get_unnormalized_answer, normalize_final_answer

    return str(normalize_final_answer(get_unnormalized_answer(output)))


def boxed_answer(output: str) -> str:
    r"""Content of an answer's last \boxed{}, normalised as Minerva does; empty without one."""
    from lm_eval.tasks.minerva_math.utils import last_boxed_only_string, normalize_final_answer, remove_boxed

    boxed = last_boxed_only_string(output)
    return str(normalize_final_answer(remove_boxed(boxed))) if boxed else ""


def boxed_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, int]:
    """Scores of a MATH answer: exact_match of its last box, math_verify of the whole text; named in profiles."""
    from lm_eval.tasks.minerva_math.utils import is_equiv, process_results

    answer = boxed_answer(results[0])
    verified = int(process_results(doc, results)["math_verify"])
    return {"exact_match": int(bool(answer) and is_equiv(answer, doc["answer"])), "math_verify": verified}


def versions(tasks: Tasks) -> dict[str, Any]:
    """lm-eval's version of each leaf task."""
    return {name: task.VERSION for name, task in tasks["tasks"].items()}


@cache
def _catalogue() -> Any:
    """The index of tasks, read once. Tasks are built by other managers, one a run."""
    return _manager(None)


def _manager(data_dir: str | None) -> Any:
    """A task manager over our task folder only: indexing lm-eval's takes ten seconds."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    _confine_templates()
    return TaskManager(include_path=str(resource("tasks")), include_defaults=False, metadata={"data_dir": data_dir})


def _confine_templates() -> None:
    """Render lm-eval's templates in a sandbox: a profile may come from a third party."""
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
    """The answer that was scored: by the task's `extract` function, else the choice, else the filter's output."""
    if extract is not None:
        return extract(record["output"])
    if "choices" in record:
        return str(record["output"])
    (filtered,) = example["filtered_resps"]
    return str(filtered[0] if isinstance(filtered, list) else filtered)
