"""Conventions with a name: how a task is asked, where its answers end, how they are read. No torch, no lm-eval.

A profile is a TOML file: bundled (`tasks/profiles/NAME.toml`) or a user's own. For each task it changes fields of
lm-eval's task file, and keeps all others; tasks it does not name are lm-eval's. What a run really used is read back
from the tasks as built, and hashed: two runs with one hash were asked and read alike.

about = "…"
[tasks.gsm8k]                 # covers gsm8k and every task named gsm8k_…; the longest name that covers a task counts
source = "where this is published"
num_fewshot = 4
doc_to_text = "…"             # Jinja, or "!function module.name", as in lm-eval's files
fewshot_config = { … }        # how the examples are chosen, asked and answered, where not as lm-eval's file says
until = ["…"]
max_gen_toks = 512
chat = { thinking = true }    # written as a chat with these settings
[tasks.gsm8k.extractor]       # whole: nothing of lm-eval's filters and metrics stays
about = "…"
filter_list, metric_list, process_results, extract    # as in lm-eval's files
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

from ..common.paths import resource
from ..common.spec import DEFAULT_PROFILE, ChatSpec, RunSpec

UNSTATED = "not stated; lm-eval's used"
FUNCTION = "!function "
ASKED = (
    "description", "doc_to_text", "doc_to_choice", "doc_to_target", "gen_prefix", "fewshot_split", "fewshot_config",
    "fewshot_delimiter", "target_delimiter", "process_docs",
)  # fmt: skip
"""Fields of a task that decide what is asked."""


@dataclass(frozen=True)
class Extractor:
    """How answers are read and scored, in lm-eval's terms. extract: function of an answer's text that gives the part
    that is compared, for reports, where process_results hides it.
    """

    about: str
    metric_list: list[Any]
    filter_list: list[Any] | None = None
    process_results: str | None = None
    extract: str | None = None


@dataclass(frozen=True)
class Shots:
    """How examples are chosen, asked and answered, by lm-eval's names for it; None keeps the task's.

    sampler: default (drawn) or first_n (the first rows, in order).  process_docs: function from the rows to those that
    examples are taken from.  target_delimiter: what stands between an example's question and answer.
    """

    sampler: Literal["default", "first_n"] | None = None
    process_docs: str | None = None
    doc_to_text: str | None = None
    doc_to_target: str | None = None
    target_delimiter: str | None = None


@dataclass(frozen=True)
class TaskProtocol:
    """What a profile changes of a task; None keeps lm-eval's."""

    source: str
    num_fewshot: int | None = None
    description: str | None = None
    doc_to_text: str | None = None
    fewshot_config: Shots | None = None
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
    """A named convention. tasks: by the name that covers them."""

    name: str
    about: str
    tasks: dict[str, TaskProtocol] = field(default_factory=dict)

    def key_for(self, task: str) -> str | None:
        """The longest name of the profile that covers a task, itself or as `NAME_…`."""
        covering = [key for key in self.tasks if task == key or task.startswith(key + "_")]
        return max(covering, key=len, default=None)

    def of(self, task: str) -> TaskProtocol | None:
        """What the profile says of a task, None where it says nothing."""
        key = self.key_for(task)
        return None if key is None else self.tasks[key]


def known_profiles() -> list[str]:
    """Names of the bundled profiles."""
    return sorted(file.stem for file in (resource("tasks") / "profiles").glob("*.toml"))


def read_profile(name: str) -> Profile:
    """A bundled profile by name, or a user's own by its file. Raises ConfigError naming the file and the field."""
    own = name.endswith(".toml")
    if not own and name not in known_profiles():
        raise ConfigError(f"profile={name!r} is unknown; known: {', '.join(known_profiles())}, or a file: my.toml")
    file = Path(name) if own else resource("tasks") / "profiles" / f"{name}.toml"
    values = read_toml(file)
    try:
        tasks = values.pop("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(told, dict) for told in tasks.values()):
            raise ConfigError("tasks must be tables: [tasks.gsm8k]")
        read = {task: build(TaskProtocol, told, f"tasks.{task}.") for task, told in tasks.items()}
        profile: Profile = build(Profile, {"name": file.stem, **values, "tasks": {}})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return Profile(profile.name, profile.about, read)


def chat_of(values: Nested) -> Nested:
    """A run's values with the chat that its profile writes its tasks as, unless they set one.

    Raises ConfigError where the profile writes some as chats and others not.
    """
    if "chat" in values or "profile" not in values or not values.get("tasks"):
        return values
    profile, tasks = read_profile(str(values["profile"])), values["tasks"]
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else tasks
    chats = {name: told.chat if (told := profile.of(name)) else None for name in names}
    if len({json.dumps(asdict(chat) if chat else None) for chat in chats.values()}) > 1:
        one = ", ".join(name for name, chat in chats.items() if chat)
        raise ConfigError(f"profile={profile.name} writes {one} as a chat and the other tasks not; run them apart")
    chat = next(iter(chats.values()))
    return {**values, "chat": asdict(chat)} if chat else values


def changes(spec: RunSpec, names: Iterable[str]) -> dict[str, Nested]:
    """For each task that the run's profile or extractor changes, the changed fields of its lm-eval file.

    `generation_kwargs` holds only what changes in it. Raises ConfigError where a profile names what is no task.
    """
    names = list(names)
    asks = read_profile(spec.profile)
    reads = asks if spec.extractor is None else read_profile(spec.extractor)
    for profile in (asks, reads):
        used = {profile.key_for(name) for name in names}
        for key in profile.tasks.keys() - used:
            raise ConfigError(f"profile {profile.name}: tasks.{key} covers no task")
    found = {}
    for name in names:
        asked, read = asks.of(name), reads.of(name)
        changed = {**(_asked(asked) if asked else {}), **(_read(read.extractor) if read and read.extractor else {})}
        if changed:
            found[name] = changed
    return found


def check_chat(spec: RunSpec, names: Iterable[str]) -> None:
    """Raise ConfigError where the profile writes one of these tasks as a chat and the run does not."""
    profile = read_profile(spec.profile)
    for name in names:
        told = profile.of(name)
        if spec.chat is None and told is not None and told.chat is not None:
            raise ConfigError(f"profile={profile.name} writes {name} as a chat; pass --chat, or run it apart")


def _asked(told: TaskProtocol) -> Nested:
    """A profile's prompts, stops and lengths as fields of a task file."""
    same = ("num_fewshot", "description", "doc_to_text", "gen_prefix")
    found = {name: _function(value) for name in same if (value := getattr(told, name)) is not None}
    if told.fewshot_config is not None:
        shots = asdict(told.fewshot_config)
        found["fewshot_config"] = {name: _function(value) for name, value in shots.items() if value is not None}
    kwargs = {"until": None if told.until is None else list(told.until), "max_gen_toks": told.max_gen_toks}
    if kept := {name: value for name, value in kwargs.items() if value is not None}:
        found["generation_kwargs"] = kept
    return found


def _read(extractor: Extractor) -> Nested:
    """A profile's extractor as fields of a task file; what it leaves out is taken out of the file."""
    found = {name: _function(getattr(extractor, name)) for name in ("metric_list", "filter_list", "process_results")}
    return {**found, "metadata": {"extract": _function(extractor.extract), "extractor": extractor.about}}


def _function(value: Any) -> Any:
    """Values with "!function module.name" replaced by the function, in lists and tables too."""
    if isinstance(value, str) and value.startswith(FUNCTION):
        module, _, name = value.removeprefix(FUNCTION).strip().rpartition(".")
        if module.split(".")[0] in sys.stdlib_module_names:  # a profile may be somebody else's
            raise ConfigError(f"{value!r}: no function of Python's own reads an answer; name one made for it")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{value!r}: no such function ({error})") from error
        if not isinstance(found, FunctionType):
            raise ConfigError(f"{value!r}: is no function")
        return found
    if isinstance(value, list):
        return [_function(item) for item in value]
    if isinstance(value, dict):
        return {name: _function(item) for name, item in value.items()}
    return value


def protocol_name(spec: RunSpec) -> str:
    """The profile, what overrides it, and whose extractor reads the answers: `lm-eval+num_fewshot=0`."""
    profile = read_profile(spec.profile)
    words = [profile.name]
    words += [f"{n}={v}" for n in ("num_fewshot", "max_new_tokens") if (v := getattr(spec, n)) is not None]
    if spec.chat is not None and not any(told.chat for told in profile.tasks.values()):
        words.append("chat")
    name = "+".join(words)
    return name if spec.extractor is None else f"{name} prompts, {read_profile(spec.extractor).name} extractors"


def describe(spec: RunSpec, tasks: Mapping[str, Any], members: Mapping[str, list[str]], chat: Nested | None) -> Nested:
    """The protocol a run used, for its result: `name`, `hash` (12 hex digits of what `tasks` tells), `about`, `tasks`.

    tasks: lm-eval's, as built, by name.  members: of each task of the spec.  chat: the conversation's settings.
    """
    profile = read_profile(spec.profile)
    leaves = {leaf: _told(tasks[leaf], profile, chat) for names in members.values() for leaf in names}
    told = {}
    for name, names in members.items():  # a group is told as its first member, under the templates of all
        template = _digest([leaves[leaf]["template"] for leaf in names]) if len(names) > 1 else None
        told[name] = {**leaves[names[0]], **({"template": template} if template else {})}
    digest = _digest({leaf: {**one, "source": None} for leaf, one in leaves.items()})
    return {"name": protocol_name(spec), "hash": digest, "about": profile.about, "tasks": told}


def _told(task: Any, profile: Profile, chat: Nested | None) -> Nested:
    """One task's protocol, from the task as built."""
    config, said = task.config, profile.of(task.config.task)
    kwargs = (config.generation_kwargs or {}) if config.output_type == "generate_until" else {}
    filters = {one["name"]: json.dumps(_plain(one["filter"])) for one in config.filter_list or []}
    if config.process_results is not None or not filters:
        filters = {"none": str(_plain(config.process_results) or "as written")}
    return {
        "source": "lm-eval's task file" if profile.name == DEFAULT_PROFILE else said.source if said else UNSTATED,
        "num_fewshot": config.num_fewshot or 0,
        "template": _digest([_plain(getattr(config, name, None)) for name in ASKED]),
        "prompt": str(_plain(config.doc_to_text)),
        "until": list(kwargs.get("until") or []),
        "max_gen_toks": kwargs.get("max_gen_toks"),
        "extractors": filters,
        "metrics": [_plain(metric) for metric in config.metric_list or []],
        "version": task.VERSION,
        "chat": chat,
    }


def _plain(value: Any) -> Any:
    """Values that JSON can hold: functions by their name, dataclasses as tables."""
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
