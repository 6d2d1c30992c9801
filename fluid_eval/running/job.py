"""A run from spec to result. All checks come before the first write.

run(spec, folder)
    1) check     task names, isolation, folder                      `check_tasks`, `Run`
    2) prepare   tasks and data, tokenizer, chat, decoder           `prepare`; no weights yet
    3) answer    lm-eval's loop over FluidLM; workers start at the first missing answer    `Job.score`
    4) time      speed repeats, if asked for                        `time_in_turns`
    5) result    rows, costs, health, protocol, conditions          `result_of`, then `Run.finish`
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.registry import decoder_named
from fluid_model.tokens import single_id

from ..benchmarks import chat_template as chat
from ..benchmarks import code_tasks, datasets, lm_eval_tasks, profiles
from ..benchmarks.task_index import catalogue, digest
from ..common.progress import ProgressBar
from ..common.spec import RunSpec
from ..results import health, speed_conditions
from ..results import speed_repeats as repeats
from ..results.metrics import table_rows
from ..results.run_folder import ENVIRONMENT, RESULT, Record, Run
from ..results.stored_values import read_environment, read_result
from ..sandbox import passing
from . import environment
from .chunks import Pool
from .decoder_choice import adapted_for, reason
from .repeat_timing import time_in_turns
from .workers import open_pool

if TYPE_CHECKING:
    from fluid_model.checkpoints.checkpoint import ModelInfo

    from .answering_lm import AnsweringLM

SHOWN = 60
"""Characters of an answer or target in a notice."""
_PRINTED = ("model", "decoder", "lines", "data", "notices")
"""Fields that the result of a finished run needs to be printed again."""


NAME_LETTERS = 24
"""Of tasks, and of the model, in a run folder's name: its path then stays below 70 letters."""


def default_folder(spec: RunSpec) -> Path:
    """runs/TASKS-MODEL-DECODER-ID. Long lists of tasks become the first one and a count: gsm8k+3."""
    model = Path(spec.model.path.rstrip("/")).name[:NAME_LETTERS]
    decoder = spec.writer.rpartition(":")[2]
    tasks = "+".join(spec.tasks)
    if len(tasks) > NAME_LETTERS:
        others = f"+{len(spec.tasks) - 1}" if spec.tasks[1:] else ""
        tasks = spec.tasks[0][: NAME_LETTERS - len(others)] + others
    return Path("runs") / f"{tasks}-{model}-{decoder}-{spec.id[:8]}"


def run(spec: RunSpec, folder: Path, *, resume: bool = False, speed_repeats: int = 0) -> Nested:
    """Run a spec and return its result, as stored in result.json.

    resume: continue an unfinished run; a finished one returns its stored result under the spec's health thresholds.
    speed_repeats: times that all answers are generated again for timing, in one session (0: none).
    Raises ConfigError, with nothing written, if the spec cannot run here.
    """
    # 1) check
    repeats.check_count(speed_repeats or None)
    check_tasks(spec)
    if spec.backend is not None:
        check_backend(spec, speed_repeats)
    opened = Run(folder, spec, resume=resume)
    opened.check_same_setup({"same": own_task_files(spec)})
    timed = repeats.enough(repeats.read(folder), speed_repeats)
    if timed and (folder / RESULT).exists():
        stored = read_result(folder / RESULT, _PRINTED, shown=True)
        if not stored.get("lost"):
            return {**stored, "health": health.judge_again(stored.get("health", []), spec.health)}
    # 2) prepare
    go_offline_unless_needed(spec)
    ready = prepare(spec, lm_eval_tasks.load_tasks(spec))
    # 3) answer, time, write the result
    job = Job(spec, opened, ready)
    try:
        return job.work(0 if timed else speed_repeats)
    finally:
        job.close()


def own_task_files(spec: RunSpec) -> Nested:
    """What a resumed run must agree in, of the user's task files; empty without any."""
    return {} if spec.tasks_dir is None else {"own task files": digest(spec.tasks_dir)}


def check_tasks(spec: RunSpec) -> None:
    """Raise ConfigError if a task is unknown, or runs model-written code that cannot be isolated here."""
    names = catalogue(spec.tasks_dir)
    names.check(spec.tasks)
    if unsafe := names.unsafe(spec.tasks):
        passing.allow_unsafe(spec.allow_unsafe_code)
        try:
            passing.isolation()
        except ConfigError as error:
            raise ConfigError(f"task {unsafe[0]} runs code written by the model: {error}") from None


def check_backend(spec: RunSpec, speed_repeats: int = 0) -> None:
    """Raise ConfigError if lm-eval has no such model, or speed repeats are asked for."""
    from .backend_pool import check_name

    assert spec.backend is not None, "the caller asks for a backend"
    check_name(spec.backend.name)
    if speed_repeats:
        raise ConfigError(
            f"speed_repeats={speed_repeats}: answers of backend {spec.backend.name} are timed once; leave it out"
        )


def go_offline_unless_needed(spec: RunSpec) -> None:
    """Go offline if the model or data come from the hub and it does not answer."""
    if not (spec.data_dir and Path(spec.model.path).expanduser().is_dir()):
        datasets.go_offline_if_unreachable()


@dataclass(frozen=True)
class Prepared:
    """Parts of a run that need no weights.

    tasks: lm-eval's, built.  window: the model's, in tokens.  conversation: None for plain prompts.
    tokenizer, window: None of a backend, which has its own.
    remote_code: classes from the model's repository.  decoder: a line that names the decoder, and why.
    quantization: of the weights, if they are or were quantised.
    """

    tasks: lm_eval_tasks.Tasks
    tokenizer: Any
    window: int | None
    conversation: chat.Chat | None
    remote_code: tuple[str, ...]
    decoder: str
    quantization: str | None


def prepare(spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> Prepared:
    """Check a spec against its model's files and open tokenizer and chat, before weights are read.

    Raises ConfigError if the spec cannot run here.
    """
    if spec.backend is not None:
        from .backend_pool import quantization

        lm_eval_tasks.check_settings(spec, tasks, None)
        about = f"{Path(spec.model.path).name}: backend {spec.backend.name} of lm-eval, no decoder of this package"
        return Prepared(tasks, None, None, None, (), about, quantization(spec))
    from fluid_model.checkpoints.checkpoint import describe, load_tokenizer, pick_device

    pick_device(spec.model.device)
    trust = spec.model.trust_remote_code
    model = spec.model
    info = describe(model.path, model.method, trust_remote_code=trust, base=model.base, dtype=model.dtype)
    check_decoder(spec, info)
    tokenizer = load_tokenizer(spec.model.path, trust_remote_code=trust, base=spec.model.base)
    if spec.model.mask_token is not None:
        single_id(tokenizer, spec.model.mask_token)
    for text in spec.model.end_tokens or ():
        single_id(tokenizer, text, "end token")
    conversation = chat.open_chat(spec.chat, tokenizer, spec.model.path)
    lm_eval_tasks.check_settings(spec, tasks, info.window)
    return Prepared(
        tasks, tokenizer, info.window, conversation, info.remote_code, reason(spec, info), info.quantization
    )


def check_decoder(spec: RunSpec, info: ModelInfo) -> None:
    """Raise ConfigError if the decoder does not fit this model."""
    from fluid_model.decoders import check_strategy

    decoder, path, tau = spec.decoder, spec.model.path, info.tau
    # 1) the method, and its parts
    if "K-head" in decoder.needs and info.k_max is None:
        raise ConfigError(f"decoder={decoder.name} needs a K-head, and {path} has none; use --decoder ar")
    own = adapted_for(info)
    if decoder.methods and info.method not in decoder.methods:
        was = f"was adapted to {info.method}" if info.method else "is a plain causal model"
        raise ConfigError(f"decoder={decoder.name}: {path} {was}; use --decoder {own}")
    if not decoder.methods and decoder_named(own).scorer is not None:
        raise ConfigError(f"decoder={decoder.name}: {path} reads in both directions; use --decoder {own}")
    # 2) the settings, and the decoder's code
    decoder.check_model(info.k_max, info.block_length)
    check_strategy(decoder)
    if spec.model.tau is not None and spec.model.tau not in tau:
        known = ", ".join(map(str, tau)) or "none"
        raise ConfigError(f"model.tau={spec.model.tau}: {spec.model.path} has K-heads for tau = {known}")


class Job:
    """One run in progress. opened: its run folder.  lm: the model that lm-eval calls."""

    def __init__(
        self,
        spec: RunSpec,
        opened: Run,
        ready: Prepared,
        bar: Callable[[str, int], ProgressBar] = ProgressBar,
        encoded: dict[str, tuple[int, ...]] | None = None,
        shared: Callable[[], Pool] | None = None,
    ) -> None:
        """bar: opens a progress bar.  encoded: token ids by text, shared by jobs with one tokenizer.

        shared: a pool that others open, begin and close, as a sweep does.
        """
        self.spec = spec
        self.opened = opened
        self.ready = ready
        self._chat = ready.conversation
        self._shared = shared
        self._pool: Pool | None = None
        self._started = datetime.now(UTC)
        self.lm = self._writer(bar, encoded)

    def _writer(
        self, bar: Callable[[str, int], ProgressBar], encoded: dict[str, tuple[int, ...]] | None
    ) -> AnsweringLM:  # fmt: skip
        """The model that lm-eval calls: a decoder of this package, or a backend."""
        ready, start_tests = self.ready, partial(lm_eval_tasks.begin_judging, self.ready.tasks)
        if ready.window is None:
            from .backend_model import BackendLM

            return BackendLM(self.pool, self.opened, bar, start_tests)
        from .lm_eval_model import FluidLM

        return FluidLM(
            ready.tokenizer, ready.window, self.pool, self.opened, bar, ready.conversation, encoded, start_tests
        )

    def pool(self) -> Pool:
        """The workers, started when the first answer is missing."""
        if self._shared is not None:
            return self._shared()
        if self._pool is None:
            print(self.ready.decoder, file=sys.stderr)
            self._pool = open_pool(self.spec)
            self.begin(self._pool)
        return self._pool

    def begin(self, pool: Pool, session: str | None = None) -> None:
        """Load the model, then write the run folder's spec and environment. session: shared by runs timed in turns."""
        facts = pool.facts(self.spec)
        self.lm.at_once = facts["device"] not in ("cpu", None)
        values = {**environment.describe(), "started": self._started.isoformat(timespec="seconds")}
        values["session"] = session or secrets.token_hex(6)
        values["engine"] = {**facts, "workers": pool.size}
        # a resumed run must agree in these, see `Run.begin`
        same = {name: facts.get(name) for name in ("weights", "device", "dtype")}
        same |= {name: values["versions"][name] for name in ("torch", "transformers", "lm-eval")}
        same["task versions"] = lm_eval_tasks.versions(self.ready.tasks)
        same |= own_task_files(self.spec)
        values["same"] = same
        values["data"] = [vars(fingerprint) for fingerprint in datasets.fingerprints(self.spec.data_dir)]
        runs_code = any(map(code_tasks.runs_code, self.ready.tasks["tasks"].values()))
        values["isolation"] = passing.isolation() if runs_code else None
        self.opened.begin(values)

    def work(self, speed_repeats: int = 0) -> Nested:
        """Answer and score all requests, take speed repeats, write and return the result."""
        clock = time.perf_counter()
        records = self.score()
        if speed_repeats:
            asked = lm_eval_tasks.requests(self.spec, self.ready.tasks, self.lm)
            time_in_turns(self.pool(), {"": self}, {"": asked}, speed_repeats)
        result = self._result(records)
        result["wall_seconds"] = round(time.perf_counter() - clock, 3)
        self.opened.finish(records, result)
        return result

    def score(self, share: float = 1.0) -> list[Record]:
        """Scored samples. share: fraction of each task's documents, from the first."""
        results = lm_eval_tasks.evaluate(self.spec, self.ready.tasks, self.lm, share)
        return lm_eval_tasks.scored_records(self.ready.tasks, results, self.opened.samples)

    def health(self, records: list[Record]) -> list[Nested]:
        """Health gates of scored samples."""
        return _health(self.spec, self.ready.tasks, records)

    def _result(self, records: list[Record]) -> Nested:
        stored_repeats = repeats.read(self.opened.folder)
        stored_environment = read_environment(self.opened.folder / ENVIRONMENT)
        chat_settings = self._chat.describe() if self._chat else None
        if self.spec.backend is not None and self.spec.chat is not None:
            chat_settings = {"template": f"{self.spec.backend.name}'s", "system": self.spec.chat.system}
        return {
            **result_of(self.spec, self.ready.tasks, records, chat_settings, stored_repeats),
            "conditions": speed_conditions.describe(stored_environment, self.spec.to_dict(), records),
            "started": self._started.isoformat(timespec="seconds"),
            "remote_code": list(self.ready.remote_code),
            "quantization": self.ready.quantization,
            "notices": [
                *self.opened.notices,
                *filter(None, [self.spec.decoder.approximation]),
                *(self._chat.notices(records) if self._chat else []),
                *repeats.notices(stored_repeats),
                *_of_backend(self.spec, records),
                *_without_a_score(records),
            ],
        }

    def close(self) -> None:
        self.opened.close()
        if self._pool is not None:
            self._pool.close()


def _of_backend(spec: RunSpec, records: Sequence[Record]) -> list[str]:
    """How a backend's tokens and seconds were counted."""
    if spec.backend is None:
        return []
    counted = dict.fromkeys(record["counted"] for record in records if "counted" in record)
    tokens = f"tokens are counted {' or '.join(counted)}" if counted else "tokens are not known"
    return [f"backend {spec.backend.name}: {tokens}; seconds are wall time of its calls; forwards are not known"]


def _without_a_score(records: Sequence[Record]) -> list[str]:
    """A line for each task (three at most) none of whose written answers scores: what was compared with what.

    Often the model is right and the task's filter is not. Programs are judged by tests, which say why.
    """
    by_task: dict[str, list[Record]] = {}
    for record in records:
        if "lost" not in record and record.get("scores") and record["finish"] is not None:
            by_task.setdefault(record["task"], []).append(record)
    lines = []
    for task, own in by_task.items():
        if any(any(record["scores"].values()) for record in own) or "verdicts" in own[0]:
            continue
        extracted = next(iter(own[0].get("extracted", {}).values()), "")
        texts = [repr(str(text)[:SHOWN] + "…" * (len(str(text)) > SHOWN)) for text in (extracted, own[0].get("target"))]
        lines.append(f"{task}: no answer scores; of {own[0]['key']}, {texts[0]} was compared with {texts[1]}")
    return lines[:3]


def result_of(
    spec: RunSpec,
    tasks: lm_eval_tasks.Tasks,
    records: list[Record],
    chat: Nested | None,
    stored_repeats: Sequence[repeats.Repeat],
) -> Nested:
    """The result of scored samples, as stored. chat: its settings.

    lines: rows of the spec's tasks.  parts: rows of tasks and groups inside them.  members: leaf tasks of each task.
    """
    members = _members(spec, tasks)

    def rows_of(name: str) -> list[dict[str, Any]]:
        leaves = set(members.get(name) or lm_eval_tasks.members(tasks, name))
        own = [r for r in records if r["task"] in leaves]
        others = lm_eval_tasks.aggregates(tasks, name, {metric for r in own for metric in r.get("scores", ())})
        return [row.to_dict() for row in table_rows(name, own, stored_repeats, others)]

    parts = [*tasks["groups"], *(n for n in tasks["tasks"] if n not in spec.tasks)]
    return {
        "spec_id": spec.id,
        "model": spec.model.path,
        "decoder": spec.to_dict()["decoder"],
        "chat": chat,
        "protocol": profiles.describe(spec, tasks["tasks"], members, chat),
        "lines": [row for name in spec.tasks for row in rows_of(name)],
        "members": members,
        "parts": [row for name in parts if name not in spec.tasks for row in rows_of(name)],
        "task_versions": lm_eval_tasks.versions(tasks),
        "data": [f.message for f in datasets.fingerprints(spec.data_dir)],
        "health": _health(spec, tasks, records),
        "lost": {record["key"]: record["lost"] for record in records if "lost" in record},
    }


def _members(spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> dict[str, list[str]]:
    return {name: lm_eval_tasks.members(tasks, name) for name in spec.tasks}


def _health(spec: RunSpec, tasks: lm_eval_tasks.Tasks, records: list[Record]) -> list[Nested]:
    return [gate.to_dict() for gate in health.gates(records, _members(spec, tasks), spec.health)]
