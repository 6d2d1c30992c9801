"""Profiles: named evaluation conventions (prompt, shots, stops, answer extraction). Neither torch nor lm-eval.

A profile is a TOML file: bundled (`tasks/profiles/NAME.toml`) or a user's own. For each task it overrides fields of
lm-eval's task file; tasks it does not name stay lm-eval's. Profiles apply to this package's own tasks alone: of
lm-eval's others and a user's, `gsm8k_cot` for instance, the task file is the convention.

    about = "…"
    [tasks.gsm8k]                 # gsm8k and every task named gsm8k_…; the longest matching name wins
    source = "where this is published"
    num_fewshot = 4
    doc_to_text = "…"             # Jinja, or "!function module.name", as in lm-eval's files
    fewshot_config = { … }        # choice, prompt and answer of few-shot examples, where they differ from lm-eval's
    until = ["…"]
    max_gen_toks = 512
    chat = { thinking = true }    # chat settings
    [tasks.gsm8k.extractor]       # replaces lm-eval's filters and metrics entirely
    about = "…"
    filter_list, metric_list, process_results, extract    # as in lm-eval's files

The protocol that a run used is read back from the built tasks and hashed: equal hashes mean equal prompts, stops and
extraction.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least, build
from fluid_model.common.files import Nested, read_toml
from fluid_model.common.names import did_you_mean

from ..common.paths import resource
from ..common.spec import DEFAULT_PROFILE, ChatSpec, RunSpec
from .task_index import of_this_package, with_task_names

UNSTATED = "not stated; lm-eval's used"
FUNCTION = "!function "
PROMPT_FIELDS = (
    "description", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix", "fewshot_split", "fewshot_config",
    "fewshot_delimiter", "target_delimiter", "process_docs",
)  # fmt: skip
"""Fields of a task file that decide its prompts."""


@dataclass(frozen=True)
class Extractor:
    """Answer extraction and metrics, in lm-eval's terms.

    extract: function from an answer's text to the part that is compared; reports need it if process_results scores the
    text itself.
    """

    about: str
    metric_list: list[Any]
    filter_list: list[Any] | None = None
    process_results: str | None = None
    extract: str | None = None


@dataclass(frozen=True)
class FewShotConfig:
    """lm-eval's `fewshot_config`; None keeps the task's.

    sampler: default (random) or first_n (the first rows, in order).  process_docs: function from the split's rows to
    the candidate examples.  target_delimiter: text between an example's question and answer.
    """

    sampler: Literal["default", "first_n"] | None = None
    process_docs: str | None = None
    doc_to_text: str | None = None
    doc_to_target: str | None = None
    target_delimiter: str | None = None


@dataclass(frozen=True)
class TaskProtocol:
    """A profile's overrides of one task; None keeps lm-eval's."""

    source: str
    num_fewshot: int | None = None
    description: str | None = None
    doc_to_text: str | None = None
    fewshot_config: FewShotConfig | None = None
    gen_prefix: str | None = None
    until: tuple[str, ...] | None = None
    max_gen_toks: int | None = None
    chat: ChatSpec | None = None
    extractor: Extractor | None = None

    def __post_init__(self) -> None:
        at_least("num_fewshot", self.num_fewshot, 0)
        at_least("max_gen_toks", self.max_gen_toks, 1)


@dataclass(frozen=True)
class Profile:
    """A named evaluation convention. tasks: overrides by task name or prefix."""

    name: str
    about: str
    tasks: dict[str, TaskProtocol] = field(default_factory=dict)

    def key_for(self, task: str) -> str | None:
        """The longest name in the profile that matches one of this package's tasks, as itself or as `NAME_…`."""
        if task not in of_this_package():
            return None
        matching = [key for key in self.tasks if task == key or task.startswith(key + "_")]
        return max(matching, key=len, default=None)

    def of(self, task: str) -> TaskProtocol | None:
        """Overrides of a task, None where the profile has none."""
        key = self.key_for(task)
        return None if key is None else self.tasks[key]


def known_profiles() -> list[str]:
    """Names of the bundled profiles."""
    return sorted(file.stem for file in (resource("tasks") / "profiles").glob("*.toml"))


def read_profile(name: str) -> Profile:
    """A bundled profile by name, or a user's own by its file. Raises ConfigError naming the file and the field."""
    own = name.endswith(".toml")
    if not own and name not in known_profiles():
        meant = did_you_mean(name, known_profiles())
        raise ConfigError(
            f"profile={name!r} is unknown; {meant}known: {', '.join(known_profiles())}, or a file: my.toml"
        )
    file = Path(name) if own else resource("tasks") / "profiles" / f"{name}.toml"
    values = read_toml(file)
    try:
        tasks = values.pop("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(table, dict) for table in tasks.values()):
            raise ConfigError("tasks must be tables: [tasks.gsm8k]")
        protocols = {task: build(TaskProtocol, table, f"tasks.{task}.") for task, table in tasks.items()}
        profile: Profile = build(Profile, {"name": file.stem, **values, "tasks": {}})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return Profile(profile.name, profile.about, protocols)


def chat_of(values: Nested) -> Nested:
    """A run's values with its tasks by name, and with the chat settings of its profile unless they set their own.

    Raises ConfigError if the profile has chat settings for some of the tasks only, or a task pattern matches none.
    """
    values = with_task_names(values)
    if "chat" in values or "profile" not in values or not values.get("tasks"):
        return values
    profile = read_profile(str(values["profile"]))
    protocols = {name: profile.of(name) for name in values["tasks"]}
    chats = {name: protocol.chat if protocol else None for name, protocol in protocols.items()}
    if len({json.dumps(asdict(chat) if chat else None) for chat in chats.values()}) > 1:
        one = ", ".join(name for name, chat in chats.items() if chat)
        raise ConfigError(f"profile={profile.name} writes {one} as a chat and the other tasks not; run them apart")
    chat = next(iter(chats.values()))
    return {**values, "chat": asdict(chat)} if chat else values


def changes(spec: RunSpec, names: Iterable[str]) -> dict[str, Nested]:
    """Overrides of lm-eval's task files, by task: prompts from the run's profile, extraction from its extractor's.

    `generation_kwargs` holds only its changed keys. Raises ConfigError if a profile names no existing task.
    """
    names = list(names)
    prompting = read_profile(spec.profile)
    extracting = prompting if spec.extractor is None else read_profile(spec.extractor)
    for profile in (prompting, extracting):
        used = {profile.key_for(name) for name in names}
        for key in profile.tasks.keys() - used:
            raise ConfigError(f"profile {profile.name}: tasks.{key} covers no task of this package's own")
    overrides = {}
    for name in names:
        fields_changed: Nested = {}
        if (protocol := prompting.of(name)) is not None:
            fields_changed |= _prompt_fields(protocol)
        if (protocol := extracting.of(name)) is not None and protocol.extractor is not None:
            fields_changed |= _extractor_fields(protocol.extractor)
        if fields_changed:
            overrides[name] = fields_changed
    return overrides


def check_chat(spec: RunSpec, names: Iterable[str]) -> None:
    """Raise ConfigError if the profile has chat settings for one of these tasks and the run is no chat."""
    profile = read_profile(spec.profile)
    for name in names:
        protocol = profile.of(name)
        if spec.chat is None and protocol is not None and protocol.chat is not None:
            raise ConfigError(f"profile={profile.name} writes {name} as a chat; pass --chat, or run it apart")


def _prompt_fields(protocol: TaskProtocol) -> Nested:
    """A profile's prompts, stops and lengths as fields of a task file."""
    same_name = ("num_fewshot", "description", "doc_to_text", "gen_prefix")
    values = {name: _function(value) for name in same_name if (value := getattr(protocol, name)) is not None}
    if protocol.fewshot_config is not None:
        shots = asdict(protocol.fewshot_config)
        values["fewshot_config"] = {name: _function(value) for name, value in shots.items() if value is not None}
    generation: Nested = {}
    if protocol.until is not None:
        generation["until"] = list(protocol.until)
    if protocol.max_gen_toks is not None:
        generation["max_gen_toks"] = protocol.max_gen_toks
    if generation:
        values["generation_kwargs"] = generation
    return values


def _extractor_fields(extractor: Extractor) -> Nested:
    """A profile's extractor as fields of a task file. Fields it leaves out are removed from the file."""
    values = {name: _function(getattr(extractor, name)) for name in ("metric_list", "filter_list", "process_results")}
    return {**values, "metadata": {"extract": _function(extractor.extract), "extractor": extractor.about}}


def _function(value: Any) -> Any:
    """A value with each "!function module.name" resolved, in nested lists and tables too."""
    if isinstance(value, str) and value.startswith(FUNCTION):
        module, _, name = value.removeprefix(FUNCTION).strip().rpartition(".")
        if module.split(".")[0] in sys.stdlib_module_names:  # a profile may come from a third party
            raise ConfigError(f"{value!r}: no function of Python's own reads an answer; name one made for it")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{value!r}: no such function ({error})") from error
        if not isinstance(function, FunctionType):
            raise ConfigError(f"{value!r}: is no function")
        return function
    if isinstance(value, list):
        return [_function(item) for item in value]
    if isinstance(value, dict):
        return {name: _function(item) for name, item in value.items()}
    return value


def protocol_name(spec: RunSpec) -> str:
    """The profile with the run's overrides and extractor, such as `lm-eval+num_fewshot=0`."""
    profile = read_profile(spec.profile)
    words = [profile.name]
    words += [f"{n}={v}" for n in ("num_fewshot", "max_new_tokens") if (v := getattr(spec, n)) is not None]
    if spec.chat is not None and not any(protocol.chat for protocol in profile.tasks.values()):
        words.append("chat")
    name = "+".join(words)
    return name if spec.extractor is None else f"{name} prompts, {read_profile(spec.extractor).name} extractors"


def describe(spec: RunSpec, tasks: Mapping[str, Any], members: Mapping[str, list[str]], chat: Nested | None) -> Nested:
    """The protocol that a run used, for its result: `name`, `hash` (12 hex digits over the tasks), `about`, `tasks`.

    tasks: lm-eval's, as built, by name.  members: leaf tasks of each task of the spec.  chat: its settings.
    """
    profile = read_profile(spec.profile)
    leaves = {leaf: _task_protocol(tasks[leaf], profile, chat) for names in members.values() for leaf in names}
    protocols = {}
    for name, names in members.items():
        protocols[name] = dict(leaves[names[0]])  # a group shows its first member's
        if len(names) > 1:
            protocols[name]["template"] = _digest([leaves[leaf]["template"] for leaf in names])
    digest = _digest({leaf: {**protocol, "source": None} for leaf, protocol in leaves.items()})
    return {"name": protocol_name(spec), "hash": digest, "about": profile.about, "tasks": protocols}


def _task_protocol(task: Any, profile: Profile, chat: Nested | None) -> Nested:
    """One task's protocol, read from the task as built."""
    config = task.config
    override = profile.of(config.task)
    published = override.source if override else UNSTATED
    filters = {one["name"]: json.dumps(_plain(one["filter"])) for one in config.filter_list or []}
    if config.process_results is not None or not filters:
        filters = {"none": str(_plain(config.process_results) or "as written")}
    kwargs = (config.generation_kwargs or {}) if config.output_type == "generate_until" else {}
    until = kwargs.get("until")
    return {
        "source": "lm-eval's task file" if profile.name == DEFAULT_PROFILE else published,
        "num_fewshot": config.num_fewshot or 0,
        "template": _digest([_plain(getattr(config, name, None)) for name in PROMPT_FIELDS]),
        "prompt": str(_plain(config.doc_to_text)),
        "until": [until] if isinstance(until, str) else list(until or []),
        "max_gen_toks": kwargs.get("max_gen_toks"),
        "extractors": filters,
        "metrics": [_plain(metric) for metric in config.metric_list or []],
        "version": task.VERSION,
        "chat": chat,
    }


def _plain(value: Any) -> Any:
    """A value as JSON: functions by their qualified name, dataclasses as tables."""
    if isinstance(value, partial):
        return _plain(value.func)
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if not f.name.startswith("_")}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _digest(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
