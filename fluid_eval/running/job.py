"""The main job: spec in, run folder and result out. What can be wrong is found before anything is written."""

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
from fluid_model.settings import FluidSettings, NbdiffSettings
from fluid_model.tokens import single_id

from ..benchmarks import chat_template as chat
from ..benchmarks import datasets, lm_eval_tasks, profiles
from ..common.progress import Bar
from ..common.spec import RunSpec
from ..results import health, speed_conditions
from ..results import speed_repeats as repeats
from ..results.metrics import lines
from ..results.run_folder import ENVIRONMENT, RESULT, Record, Run
from ..results.stored_values import read_environment, read_result
from ..sandbox import passing
from . import environment
from .decoder_choice import reason
from .repeat_timing import time_in_turns
from .workers import Pool, open_pool

if TYPE_CHECKING:
    from fluid_model.checkpoints.checkpoint import ModelInfo


_PRINTED = ("model", "decoder", "lines", "data", "notices")
"""What a run that is finished already must tell of itself."""


def default_folder(spec: RunSpec) -> Path:
    """runs/TASKS-MODEL-ID."""
    model = Path(spec.model.path.rstrip("/")).name
    tasks = "+".join(spec.tasks) if len(spec.tasks) <= 4 else f"{spec.tasks[0]}+{len(spec.tasks) - 1}"
    return Path("runs") / f"{tasks}-{model}-{spec.decoder.name}-{spec.id[:8]}"


def run(spec: RunSpec, folder: Path, *, resume: bool = False, speed_repeats: int = 0) -> Nested:
    """Run a spec to its end and return the result, as stored in result.json.

    speed_repeats: how often all answers are written again for their time, at least, in one session (0: not at all).
    Raises ConfigError, with nothing written, if the spec cannot be run here.
    """
    repeats.check_count(speed_repeats or None)
    check_tasks(spec)
    opened = Run(folder, spec, resume=resume)
    timed = repeats.enough(repeats.read(folder), speed_repeats)
    held = read_result(folder / RESULT, _PRINTED, shown=True) if timed and (folder / RESULT).exists() else None
    if held is not None and not held.get("lost"):
        return {**held, "health": health.judge_again(held.get("health", []), spec.health)}
    go_offline_unless_needed(spec)
    ready = prepare(spec, lm_eval_tasks.load_tasks(spec))
    job = Job(spec, opened, ready)
    try:
        return job.work(0 if timed else speed_repeats)
    finally:
        job.close()


def check_tasks(spec: RunSpec) -> None:
    """Raise ConfigError if a task is unknown, or would run code that cannot be isolated here."""
    lm_eval_tasks.check_names(spec.tasks)
    if unsafe := lm_eval_tasks.unsafe_names(spec.tasks):
        passing.allow_unsafe(spec.allow_unsafe_code)
        try:
            passing.isolation()
        except ConfigError as error:
            raise ConfigError(f"task {unsafe[0]} runs code written by the model: {error}") from None


def go_offline_unless_needed(spec: RunSpec) -> None:
    """Have nobody wait for a hub that is not there, where model or data are to come from it."""
    if not (spec.data_dir and Path(spec.model.path).expanduser().is_dir()):
        datasets.go_offline_if_unreachable()


@dataclass(frozen=True)
class Ready:
    """What a run needs beside weights. window: tokens the model reads.  remote_code: classes of its repository.
    decoder: which writes, and why, in a line.
    """

    tasks: lm_eval_tasks.Tasks
    tokenizer: Any
    window: int
    conversation: chat.Chat | None
    remote_code: tuple[str, ...]
    decoder: str


def prepare(spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> Ready:
    """All that can be known before weights are read. Raises ConfigError if the spec cannot be run here."""
    from fluid_model.checkpoints.checkpoint import describe, load_tokenizer, pick_device

    pick_device(spec.model.device)
    trust = spec.model.trust_remote_code
    info = describe(spec.model.path, spec.model.method, trust_remote_code=trust, base=spec.model.base)
    check_decoder(spec, info)
    tokenizer = load_tokenizer(spec.model.path, trust_remote_code=trust, base=spec.model.base)
    if spec.model.mask_token is not None:
        single_id(tokenizer, spec.model.mask_token)
    for text in spec.model.end_tokens or ():
        single_id(tokenizer, text, "end token")
    conversation = chat.open_chat(spec.chat, tokenizer, spec.model.path)
    lm_eval_tasks.check_settings(spec, tasks, info.window)
    return Ready(tasks, tokenizer, info.window, conversation, info.remote_code, reason(spec, info))


def check_decoder(spec: RunSpec, info: ModelInfo) -> None:
    """Raise ConfigError if the decoder cannot serve this model."""
    name, k_max, tau = spec.decoder.name, info.k_max, info.tau
    if name == "fluid" and k_max is None:
        raise ConfigError(f"decoder=fluid needs a K-head, and {spec.model.path} has none; use --decoder ar")
    if spec.decoder.method not in (None, info.method):
        was = f"was adapted to {info.method}" if info.method else "is a plain causal model"
        raise ConfigError(f"decoder={name}: {spec.model.path} {was}; use --decoder {info.method or 'ar'}")
    if name == "ar" and info.method == "llada":
        raise ConfigError(f"decoder=ar: {spec.model.path} reads in both directions; use --decoder llada")
    if isinstance(spec.decoder, NbdiffSettings):
        spec.decoder.small_block_length(spec.decoder.block_length_for(info.block_length))
    floor = spec.decoder.min_horizon if isinstance(spec.decoder, FluidSettings) else 1
    if k_max is not None and floor > k_max:
        raise ConfigError(f"min_horizon={floor} exceeds what this model's K-head was trained for (k_max={k_max})")
    if spec.model.tau is not None and spec.model.tau not in tau:
        known = ", ".join(map(str, tau)) or "none"
        raise ConfigError(f"model.tau={spec.model.tau}: {spec.model.path} has K-heads for tau = {known}")


class Job:
    """One run under way."""

    def __init__(
        self,
        spec: RunSpec,
        opened: Run,
        ready: Ready,
        bar: Callable[[str, int], Bar] = Bar,
        encoded: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        """encoded: ids by text, shared by jobs with the same tokenizer."""
        from .lm_eval_model import FluidLM

        self.spec = spec
        self.opened = opened
        self.ready = ready
        self._chat = ready.conversation
        self._pool: Pool | None = None
        self._started = datetime.now(UTC)
        judge = partial(lm_eval_tasks.begin_judging, ready.tasks)
        self.lm = FluidLM(ready.tokenizer, ready.window, self.pool, opened, bar, ready.conversation, encoded, judge)

    def pool(self) -> Pool:
        """The workers, started when the first answer is missing."""
        if self._pool is None:
            print(self.ready.decoder, file=sys.stderr)
            self._pool = open_pool(self.spec)
            self.begin(self._pool)
        return self._pool

    def begin(self, pool: Pool, session: str | None = None) -> None:
        """Write the run folder's head: only now is the model known to load. session: of runs answered in turns."""
        facts = pool.facts(self.spec)
        self.lm.at_once = facts["device"] != "cpu"
        where = {**environment.describe(), "started": self._started.isoformat(timespec="seconds")}
        where["session"] = session or secrets.token_hex(6)
        where["engine"] = {**facts, "workers": pool.size}
        where["same"] = {name: facts.get(name) for name in ("weights", "device", "dtype")}
        where["same"] |= {name: where["versions"][name] for name in ("torch", "transformers", "lm-eval")}
        where["same"]["task versions"] = lm_eval_tasks.versions(self.ready.tasks)
        where["data"] = [vars(f) for f in datasets.fingerprints(self.spec.data_dir)]
        where["isolation"] = (
            passing.isolation() if any(map(lm_eval_tasks.runs_code, self.ready.tasks["tasks"].values())) else None
        )
        self.opened.begin(where)

    def work(self, speed_repeats: int = 0) -> Nested:
        """Have everything answered and scored, and timed so often; write and return the result."""
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
        """Samples with their scores, of the first documents of each task: that share of them."""
        results = lm_eval_tasks.evaluate(self.spec, self.ready.tasks, self.lm, share)
        return lm_eval_tasks.scored_records(self.ready.tasks, results, self.opened.samples)

    def health(self, records: list[Record]) -> list[Nested]:
        """What the health gates count in scored samples."""
        return _health(self.spec, self.ready.tasks, records)

    def _result(self, records: list[Record]) -> Nested:
        held = repeats.read(self.opened.folder)
        where = read_environment(self.opened.folder / ENVIRONMENT)
        talk = self._chat.describe() if self._chat else None
        return {
            **result_of(self.spec, self.ready.tasks, records, talk, held),
            "conditions": speed_conditions.describe(where, self.spec.to_dict(), records),
            "started": self._started.isoformat(timespec="seconds"),
            "remote_code": list(self.ready.remote_code),
            "notices": [
                *self.opened.notices,
                *(self._chat.notices(records) if self._chat else []),
                *repeats.notices(held),
            ],
        }

    def close(self) -> None:
        self.opened.close()
        if self._pool is not None:
            self._pool.close()


def result_of(
    spec: RunSpec,
    tasks: lm_eval_tasks.Tasks,
    records: list[Record],
    chat: Nested | None,
    held: Sequence[repeats.Repeat],
) -> Nested:
    """What scored samples come to: lines, members, parts, protocol. chat: the conversation's.  held: speed repeats."""
    members = _members(spec, tasks)

    def table(name: str) -> list[dict[str, Any]]:
        leaves = set(members.get(name) or lm_eval_tasks.members(tasks, name))
        return [line.to_dict() for line in lines(name, [r for r in records if r["task"] in leaves], held)]

    parts = [*tasks["groups"], *(n for n in tasks["tasks"] if n not in spec.tasks)]
    return {
        "spec_id": spec.id,
        "model": spec.model.path,
        "decoder": spec.to_dict()["decoder"],
        "chat": chat,
        "protocol": profiles.describe(spec, tasks["tasks"], members, chat),
        "lines": [line for name in spec.tasks for line in table(name)],
        "members": members,
        "parts": [line for name in parts if name not in spec.tasks for line in table(name)],
        "task_versions": lm_eval_tasks.versions(tasks),
        "data": [f.message for f in datasets.fingerprints(spec.data_dir)],
        "health": _health(spec, tasks, records),
        "lost": {record["key"]: record["lost"] for record in records if "lost" in record},
    }


def _members(spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> dict[str, list[str]]:
    return {name: lm_eval_tasks.members(tasks, name) for name in spec.tasks}


def _health(spec: RunSpec, tasks: lm_eval_tasks.Tasks, records: list[Record]) -> list[Nested]:
    return [gate.to_dict() for gate in health.gates(records, _members(spec, tasks), spec.health)]
