"""RunSpec: every setting of a run, frozen and validated before the run starts. No torch here.

    RunSpec
    ├── tasks, tasks_dir, limit, num_fewshot, max_new_tokens, profile, extractor, seed      the benchmark
    ├── model     ModelSpec        checkpoint, dtype, device
    ├── decoder   DecoderSettings  of any registered decoder (`fluid_model.registry`)
    ├── backend   BackendSpec      another program that writes the answers, in place of a decoder; None: none
    ├── chat      ChatSpec         None for plain prompts
    └── engine, health, batch_size, data_dir, allow_unsafe_code                  no part of the id

Values come from a TOML file, `--set a.b=c` and flags; later ones win. The id hashes the settings that decide the
answers. Settings that change speed, place or health thresholds only are left out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least, build
from fluid_model.common.files import Nested
from fluid_model.registry import check_method, decoder_settings, plain_values
from fluid_model.settings import ArSettings, DecoderSettings, check_range

from .bundled import resolved

DEFAULT_PROFILE = "lm-eval"
"""The profile of a run that names none."""


@dataclass(frozen=True)
class ModelSpec:
    """The checkpoint, and how it is loaded."""

    path: str
    """Folder, hub id, GGUF file, or the name of a bundled checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of weights and forward; auto: bfloat16 on a GPU, float32 on a CPU. int8: of weights, on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the forward runs; auto: a GPU where there is one."""
    tau: float | None = None
    """Which of a checkpoint's K-heads, by the loss bound that it was trained for."""
    mask_token: str | None = None
    """Text of the mask token, if the model's files do not record it."""
    end_tokens: tuple[str, ...] | None = None
    """Texts of the tokens that end an answer, in place of the model's own."""
    method: str | None = None
    """Adaptation of the model, such as llada, if its files do not record it, or in place of the one that they tell."""
    trust_remote_code: bool = False
    """Whether code of the model's repository may run, with the user's rights."""
    base: str | None = None
    """Folder or hub id of an adapter's base model, in place of the one it names."""

    def __post_init__(self) -> None:
        if self.method is not None:
            check_method("model.method", self.method, stated=True)
        if self.end_tokens == ():
            raise ConfigError("model.end_tokens=[] leaves nothing that ends an answer; leave it out or name one text")


@dataclass(frozen=True)
class BackendSpec:
    """Another program that writes the answers: a model of lm-eval's, or the harness whose log was imported."""

    name: str
    """As lm-eval names it: hf, vllm, sglang, local-completions, ..."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, those of lm-eval's --model_args; the model's path is none of them."""

    def __post_init__(self) -> None:
        try:
            json.dumps(self.args)
        except TypeError:
            raise ConfigError(f"backend.args={self.args} must hold texts, numbers, lists and tables") from None


@dataclass(frozen=True)
class EngineSpec:
    """The workers. They change how long a run takes, never its answers."""

    kind: Literal["inline", "ray"] = "inline"
    """inline: in this process.  ray: in Ray workers."""
    workers: int | None = None
    """Ray workers; unset, one for each GPU."""
    ray_address: str | None = None
    """HOST:PORT of a Ray cluster; unset, a private one."""

    def __post_init__(self) -> None:
        at_least("engine.workers", self.workers, 1)
        if self.kind == "inline" and self.workers not in (None, 1):
            raise ConfigError(f"engine.workers={self.workers}: the inline engine has one; use --engine ray")
        if self.kind == "inline" and self.ray_address is not None:
            raise ConfigError(f"engine.ray_address={self.ray_address}: the inline engine has none; use --engine ray")


@dataclass(frozen=True)
class ChatSpec:
    """Prompts as conversations, by the tokenizer's chat template."""

    system: str | None = None
    """Text of a system turn."""
    multiturn: bool = True
    """Few-shot examples as separate turns (else all in one user turn)."""
    thinking: bool = False
    """Passed to the template as `enable_thinking`; the answer is then the text after the thinking."""
    end_of_thinking: str | None = None
    """Text that ends the thinking; unset, looked up in the vocabulary."""
    read_thoughts: bool = False
    """Score the text with its thinking, as harnesses do that do not know the end of thinking."""
    suffix: str = ""
    """Appended to the question, such as " /no_think"."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Further template variables."""
    template: str | None = None
    """Name of a template, if the tokenizer has several."""

    def __post_init__(self) -> None:
        if self.end_of_thinking == "":
            raise ConfigError("chat.end_of_thinking='' must be a text; leave it out to have it looked up")
        if self.read_thoughts and (not self.thinking or self.end_of_thinking):
            raise ConfigError("chat.read_thoughts=true: reads thoughts as answers; it needs chat.thinking=true, no end")
        for name, value in self.variables.items():
            if name in _TEMPLATE_OWN:
                raise ConfigError(f"chat.variables.{name}: the run sets it itself ({_TEMPLATE_OWN[name]})")
            try:
                json.dumps(value)
            except TypeError:
                raise ConfigError(
                    f"chat.variables.{name}={value} is a {type(value).__name__}; quote it: '\"{value}\"'"
                ) from None


@dataclass(frozen=True)
class HealthSpec:
    """Threshold of each health gate: the share of a task's samples above which the run is unhealthy; 1 turns it off.

    A counted sample may have lost its score. Faults of the set-up alone are allowed one point of score; faults that
    weak models also show, five or ten.
    """

    length_limit: float = 0.1
    """Answers that hit the length limit."""
    empty_answer: float = 0.05
    """Answers without text."""
    no_answer: float = 0.1
    """Answers in which the first filter extracted nothing."""
    prompt_truncated: float = 0.01
    """Prompts cut from the left to fit the window."""
    sandbox_timeout: float = 0.05
    """Programs that ran out of time."""
    thinking_never_ended: float = 0.1
    """Answers of a thinking model that never end their thinking."""
    broken: float = 0.0
    """Rows with numbers that are not finite."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check_range(f"health.{f.name}", getattr(self, f.name), 0, 1)


@dataclass(frozen=True)
class RunSpec:
    """One run: a model, a decoder, tasks. chat: None for plain prompts.  health: thresholds only."""

    tasks: tuple[str, ...]
    """Names of tasks and groups; on the command line and in files, of tags and patterns too."""
    model: ModelSpec
    decoder: DecoderSettings = field(default_factory=ArSettings)
    backend: BackendSpec | None = None
    chat: ChatSpec | None = None
    engine: EngineSpec = field(default_factory=EngineSpec)
    health: HealthSpec = field(default_factory=HealthSpec)
    tasks_dir: str | None = None
    """Folder with the user's own lm-eval task files."""
    data_dir: str | None = None
    """Folder with the data of tasks; unset, FLUID_DATA_DIR, else the hub."""
    limit: int | None = None
    """First N documents of each task; unset, all."""
    num_fewshot: int | None = None
    """Few-shot examples; unset, the task's own number."""
    max_new_tokens: int | None = None
    """Length limit of answers in tokens; unset, the task's own."""
    profile: str = DEFAULT_PROFILE
    """Prompts, stops and answer extraction of this package's tasks: a bundled profile's name or a TOML file."""
    extractor: str | None = None
    """Another profile to extract answers by; unset, `profile`."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows decoded together."""
    seed: int = 1234
    """Of few-shot draws and sampling."""
    allow_unsafe_code: bool = False
    """Whether generated code may run without isolation, where the machine has none."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"tasks={','.join(self.tasks)!r} must name at least one task, each once")
        at_least("limit", self.limit, 1)
        at_least("num_fewshot", self.num_fewshot, 0)
        at_least("max_new_tokens", self.max_new_tokens, 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.batch_size != "auto":
            at_least("batch_size", self.batch_size, 1)
        if self.backend is not None:
            self._check_backend(self.backend.name)

    def _check_backend(self, name: str) -> None:
        """Raise ConfigError for settings that only this package's decoders have."""
        if replace(self.model, path="") != ModelSpec(""):
            given = [f.name for f in fields(ModelSpec) if getattr(self.model, f.name) != f.default and f.name != "path"]
            raise ConfigError(
                f"model.{given[0]}={getattr(self.model, given[0])}: backend {name} loads the model itself; give it as "
                f"--backend-args {given[0]}=..."
            )
        if self.decoder != ArSettings():
            raise ConfigError(f"decoder={self.decoder.name}: backend {name} writes the answers; name one of both")
        if self.engine != EngineSpec():
            raise ConfigError(f"engine.kind={self.engine.kind}: backend {name} runs in this process, or is a server")
        allowed = ("system", "multiturn")
        for f in fields(ChatSpec) if self.chat is not None else ():
            if f.name not in allowed and getattr(self.chat, f.name) != getattr(ChatSpec(), f.name):
                raise ConfigError(
                    f"chat.{f.name}: backend {name} has its own chat template; only {' and '.join(allowed)} reach it"
                )

    @property
    def writer(self) -> str:
        """Who writes the answers: the decoder's name, or the backend's."""
        return self.decoder.name if self.backend is None else self.backend.name

    def to_dict(self) -> Nested:
        """Nested plain values; building a spec from them gives this spec again."""
        # where a decoder is named, a backend is
        writer = plain_values(self.decoder) if self.backend is None else {"name": self.backend.name}
        return dict(json.loads(json.dumps({**asdict(self), "decoder": writer})))

    def identity(self) -> Nested:
        """The settings that decide the answers, as hashed by `id`.

        Fields that did not exist in earlier versions are left out at their defaults, so that older runs keep their ids.
        """
        values = self.to_dict()
        for name in ("engine", "health", "batch_size", "data_dir", "tasks_dir", "allow_unsafe_code"):
            del values[name]
        for name, default in (("chat", None), ("profile", DEFAULT_PROFILE), ("extractor", None)):
            if values[name] == default:
                del values[name]
        if not self.model.trust_remote_code:
            del values["model"]["trust_remote_code"]
        if self.model.base is None:
            del values["model"]["base"]
        if self.backend is None:
            del values["backend"]
        for name in ("template", "read_thoughts"):
            if self.chat is not None and not getattr(self.chat, name):
                del values["chat"][name]
        return values

    @property
    def id(self) -> str:
        """12 hex digits of the identity's hash."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def tables(values: Mapping[str, Any]) -> Nested:
    """Spec values with the shorthands `model = "path"`, `decoder = "name"` and `chat = true` expanded to tables.

    The name of a bundled checkpoint becomes its folder.
    """
    values = dict(values)
    for name, inner in (("model", "path"), ("decoder", "name"), ("backend", "name")):
        if isinstance(values.get(name), str):
            values[name] = {inner: values[name]}
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("path"), str):
        values["model"] = {**model, "path": resolved(model["path"])}
    if isinstance(values.get("chat"), bool):
        chat = values.pop("chat")
        values |= {"chat": {}} if chat else {}
    return values


def build_spec(values: Mapping[str, Any], *, stored: bool = False) -> RunSpec:
    """A spec from nested values.  stored: of a run folder, whose decoder is not imported if it is foreign code.

    Raises ConfigError naming unknown fields (with the known ones) and bad values.
    """
    values = tables(values)
    if isinstance(values.get("tasks"), str):
        values["tasks"] = [name.strip() for name in values["tasks"].split(",") if name.strip()]
    for name in ("data_dir", "tasks_dir"):
        if isinstance(values.get(name), str):
            values[name] = os.path.expanduser(values[name])
    values.pop("allow_code", None)  # a field of earlier specs, without effect since code runs isolated
    given = values.pop("decoder", {})
    is_backends = _is_backends(given, values.get("backend"))
    settings = ArSettings() if is_backends else decoder_settings(given, stored=stored)
    spec: RunSpec = build(RunSpec, {**values, "decoder": settings}, how_to_give=_HOW_TO_GIVE)
    return spec


def _is_backends(decoder: Any, backend: Any) -> bool:
    """Whether a decoder's values only repeat the backend's name, as `to_dict` writes them. Raises ConfigError if both
    are given.
    """
    if not isinstance(backend, Mapping):
        return False
    if decoder not in ({}, {"name": backend.get("name")}):
        named = decoder.get("name", ", ".join(decoder)) if isinstance(decoder, Mapping) else decoder
        raise ConfigError(f"decoder={named}: backend {backend.get('name')} writes the answers; name one of both")
    return True


_TEMPLATE_OWN = {
    "enable_thinking": "from chat.thinking",
    "messages": "from the task",
    "conversation": "from the task",
    "add_generation_prompt": "from the task",
    "continue_final_message": "from the task",
    "chat_template": "from the tokenizer",
    "tokenize": "to false",
}
"""Template variables and arguments that users may not set, and where they come from."""
_HOW_TO_GIVE = {"tasks": ": pass --tasks gsm8k,mbpp", "model": ": pass --model FOLDER_OR_HUB_ID"}
