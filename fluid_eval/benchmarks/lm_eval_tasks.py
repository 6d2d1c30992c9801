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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError, reason

from ..common.spec import RunSpec
from ..results.run_folder import Record
from . import code_tasks, profiles
from .task_index import catalogue, of_this_package

if TYPE_CHECKING:
    from lm_eval.api.model import LM

Tasks = dict[str, Any]
"""Result of lm-eval's TaskManager.load: tasks, groups, group_map."""
Asked = list[Any]
"""Requests of lm-eval: a list of its Instances."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's own answer length for a task that sets none."""


@contextmanager
def _templates() -> Iterator[None]:
    """Errors of a task's template or of its Python as ConfigError."""
    from jinja2 import TemplateError, UndefinedError

    try:
        yield
    except UndefinedError as error:
        raise ConfigError(
            f"a task's template cannot be rendered: {error}: the rows of its data have no such field"
        ) from error
    except TemplateError as error:
        raise ConfigError(f"a task's template cannot be rendered: {error}") from error
    except ImportError as error:
        raise ConfigError(f"a task needs a library that is missing: {reason(error)}") from error


@_templates()
def load_tasks(spec: RunSpec) -> Tasks:
    """Build the tasks with the spec's settings and load their data.

    Raises ConfigError where data are missing, a task file cannot be built, or its programs cannot be isolated.
    """
    # 1) build
    from . import task_data  # imports datasets

    manager = _manager(spec)
    _apply_profile(manager, spec)
    splits = partial(_splits_of, manager)
    with task_data.from_folders(spec.data_dir, spec.tasks_dir, splits), code_tasks.judged_metrics():
        loaded = _load(manager, spec)
    code_tasks.check_isolated(loaded["tasks"], spec.allow_unsafe_code)
    # 2) the spec's settings
    for task in loaded["tasks"].values():
        if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=spec.num_fewshot)
        if spec.max_new_tokens is not None and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": spec.max_new_tokens}, update=True)
    profiles.check_chat(spec, loaded["tasks"])
    return loaded


def _load(manager: Any, spec: RunSpec) -> Tasks:
    """lm-eval's tasks. Errors of a task file are of any type; those of our own names are faults of this program."""
    from jinja2 import TemplateError

    try:
        return dict(manager.load(list(spec.tasks)))
    except (ConfigError, ImportError, TemplateError, OSError):
        raise
    except Exception as error:
        if not isinstance(error, ValueError) and all(name in of_this_package() for name in spec.tasks):
            raise
        raise ConfigError(f"tasks={','.join(spec.tasks)}: {type(error).__name__}: {reason(error)}") from error


def _splits_of(manager: Any, path: str, name: str | None) -> list[str]:
    """The splits that the run's tasks need of a dataset."""
    from lm_eval.tasks._yaml_loader import load_yaml

    splits: dict[str, None] = {}
    for entry in manager.task_index.values():
        config = (entry.yaml_path and load_yaml(entry.yaml_path, resolve_func=False)) or entry.cfg or {}
        if (config.get("dataset_path"), config.get("dataset_name")) == (path, name):
            asked = (config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot"))
            splits |= dict.fromkeys(split for split in asked if split)
    return list(splits)


def _apply_profile(manager: Any, spec: RunSpec) -> None:
    """Put the fields that the run's profile changes into the manager's entries of our tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = [name for name, named in of_this_package().items() if named.is_task]
    for name, changed in profiles.changes(spec, ours).items():
        if (entry := manager.task_index.get(name)) is None:
            continue
        config = load_yaml(entry.yaml_path, resolve_func=True)
        for table in ("generation_kwargs", "fewshot_config", "metadata"):
            if table in changed:
                changed = {**changed, table: {**(config.get(table) or {}), **changed[table]}}
        manager.task_index[name] = replace(entry, yaml_path=None, cfg={**config, **changed})


def check_settings(spec: RunSpec, tasks: Tasks, window: int | None) -> None:
    """Raise ConfigError if a task cannot be answered under these settings. window: the model's, in tokens.
    None: of a backend, which cuts prompts and samples itself.

    Checked: the number of shots, the answer's length against the window and the decoder's canvas, thinking, sampling.
    """
    thinking = spec.chat is not None and spec.chat.thinking
    for name, task in tasks["tasks"].items():
        # 1) few-shot examples
        shots = task.get_config("num_fewshot") or 0
        examples = len(task.sampler.df) if shots else 0
        if shots > examples:
            raise ConfigError(f"num_fewshot={shots}: task {name} has {examples} examples to draw from")
        if window is None:
            continue
        # 2) the answer's length
        settings = task.get_config("generation_kwargs") or {}
        length = settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)
        generates = task.get_config("output_type") == "generate_until"
        if not generates and spec.decoder.scorer == "":
            raise ConfigError(
                f"decoder={spec.decoder.name} defines no log-likelihood, which task {name} compares; run tasks that "
                "generate text"
            )
        if generates and (needed := spec.decoder.answer_slots(length)) >= window:
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
        heat = settings.get("temperature", 1.0) if settings.get("do_sample") else 0
        if heat > 0 and not spec.decoder.temperature:
            raise ConfigError(
                f"task {name} asks for sampling, which the decoder decides: --set decoder.temperature={heat}"
            )


def limit_for(spec: RunSpec, share: float) -> float | None:
    """lm-eval's `limit` for a share of a run's documents: a count, or a fraction where the run has no limit."""
    if share >= 1:
        return spec.limit
    return share if spec.limit is None else math.ceil(share * spec.limit)


@_templates()
def requests(spec: RunSpec, tasks: Tasks, lm: LM | None) -> Asked:
    """All requests of lm-eval's evaluation loop. lm: for chats alone.

    Raises ConfigError for a template that cannot be rendered.
    """
    asked: Asked = []
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=spec.seed)  # built before, a task has advanced its generator
        task.build_all_requests(
            limit=spec.limit,
            system_instruction=spec.chat.system if spec.chat else None,
            apply_chat_template=spec.chat is not None,
            fewshot_as_multiturn=spec.chat is not None and spec.chat.multiturn,
            chat_template=lm.apply_chat_template if lm and spec.chat else None,
            tokenizer_name=lm.tokenizer_name if lm and spec.chat else "",
        )
        asked += task.instances
    return asked


@_templates()
def evaluate(
    spec: RunSpec, tasks: Tasks, lm: LM, share: float = 1.0, documents: Mapping[str, list[int]] | None = None
) -> dict[str, Any]:
    """lm-eval's evaluation loop: build requests, answer them with `lm`, filter, score. Returns its results.

    lm-eval's own aggregates are left in `tasks["aggregates"]`: some metrics are no mean over documents.
    share: fraction of each task's documents, from the first.  documents: these alone, by leaf task; ascending.
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
        limit=limit_for(spec, share) if documents is None else None,
        samples=documents,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=True,
        apply_chat_template=spec.chat is not None,
        fewshot_as_multiturn=spec.chat is not None and spec.chat.multiturn,
        system_instruction=spec.chat.system if spec.chat else None,
    )
    assert results is not None, "rank 0 always gets results"
    tasks["aggregates"] = results["results"]
    return dict(results)


def begin_judging(tasks: Tasks, name: str, doc: dict[str, Any], text: str) -> None:
    """Start the tests of an answer that is a program, while other answers are generated."""
    task = tasks["tasks"][name]
    if code_tasks.runs_code(task):
        code_tasks.begin(task, doc, text)


def scored_records(tasks: Tasks, results: Mapping[str, Any], samples: Mapping[str, Record]) -> list[Record]:
    """Stored samples with target, extracted answers and scores from lm-eval, in task and document order.

    results: of `evaluate`; lm-eval lists a document once a filter.  samples: stored records by key.
    """
    records = []
    for name, examples in results["samples"].items():
        task = tasks["tasks"][name]
        extract = (task.get_config("metadata") or {}).get("extract")
        merged: dict[int, Record] = {}
        for example in examples:
            key = f"{name}/{example['doc_id']}"
            record = merged.setdefault(example["doc_id"], {**samples[key], "extracted": {}, "scores": {}})
            record["target"] = target_of(task, example)
            record["extracted"][example["filter"]] = _extracted(example, record, extract)
            if code_tasks.runs_code(task):
                judged = code_tasks.outcomes(task, example["doc"], example["filtered_resps"][0])
                record["verdicts"] = [{"result": v.result, "isolation": v.isolation} for v in judged]
            record["scores"] |= _scores(task, example, broken=record.get("broken", False))
        records += [merged[doc_id] for doc_id in sorted(merged)]
    return records


def _scores(task: Any, example: Mapping[str, Any], *, broken: bool) -> dict[str, float]:
    """Scores of a document that the task averages. broken: a non-finite row has no answer, so it scores 0."""
    from lm_eval.api.metrics import mean

    combined = {metric for metric, combine in task.aggregation().items() if combine is not mean}
    values = {metric: example[metric] for metric in example["metrics"] if metric not in combined}
    return {
        f"{metric},{example['filter']}": 0.0 if broken else float(value)
        for metric, value in values.items()
        if isinstance(value, (int, float)) or hasattr(value, "item")
    }


def aggregates(tasks: Tasks, name: str, scored: set[str]) -> dict[str, float]:
    """lm-eval's values of a task's or group's metrics that are not among `scored` ("metric,filter")."""
    values = tasks.get("aggregates", {}).get(name, {})
    return {
        metric: float(value)
        for metric, value in values.items()
        if metric not in scored and "," in metric and "_stderr," not in metric and isinstance(value, (int, float))
    }


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


def _manager(spec: RunSpec) -> Any:
    """A task manager that knows the run's names alone: indexing lm-eval's files itself takes long."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    _confine_templates()
    manager = TaskManager(include_defaults=False, metadata={"data_dir": spec.data_dir})
    kinds = {"task": Kind.TASK, "python": Kind.PY_TASK, "group": Kind.GROUP, "tag": Kind.TAG}
    for name, named in catalogue(spec.tasks_dir).needed(spec.tasks).items():
        tagged = set(named.members) if named.kind == "tag" else set()
        manager.task_index[name] = Entry(name, kinds[named.kind], named.file, tags=tagged)
    return manager


def _confine_templates() -> None:
    """Render lm-eval's templates in a sandbox: a profile may come from a third party."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        confined = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        confined.filters |= utils.env.filters
        utils.env = confined


def target_of(task: Any, example: Mapping[str, Any]) -> str:
    """A document's reference answer, of a multiple choice its text. example: its "doc" and "target"."""
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
