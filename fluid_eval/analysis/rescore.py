"""Rescoring: a run's stored answers scored again by another profile's extractors. No model is loaded.

Prompts, stop strings, lengths and the decoder stay those of the run. The result is an ordinary run folder; its protocol
names both: "lm-eval prompts, fluid-paper extractors".
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested

from ..benchmarks import lm_eval_tasks, profiles
from ..benchmarks.task_index import catalogue
from ..common.spec import RunSpec
from ..results import speed_repeats
from ..results.run_folder import ENVIRONMENT, POINTS, RESULT, Record, Run, held_spec, read_samples
from ..results.stored_values import read_environment, read_result
from ..running.job import result_of
from .placing import question_in

Documents = Mapping[str, list[int]]
"""Numbers of documents, ascending, by leaf task."""


class StoredLM(LM):
    """An lm-eval model that returns a run's stored answers.

    Raises ConfigError if a request has no stored answer, or its prompt is not the stored one.
    """

    tokenizer_name = ""

    def __init__(
        self, samples: Mapping[str, Record], folder: Path, *, chat: bool, documents: Documents | None = None
    ) -> None:
        """documents: of imported answers, the numbers of those that were answered, by leaf task; None of a run."""
        super().__init__()
        self._documents = documents
        self._samples = samples
        self._folder = folder
        self._chat = chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The last question alone: the template belongs to the model, which is not loaded."""
        return next(turn["content"] for turn in reversed(chat_history) if turn["role"] == "user")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [str(record["output"]) for _, record in self._records(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Stored log-likelihoods; a document's choices come in the order in which they were scored."""
        choices: dict[str, int] = {}
        scores = []
        for key, record in self._records(requests):
            if "loglikelihoods" not in record:
                raise ConfigError(
                    f"{self._folder}: the task of {key} compares likelihoods, and this answer was written"
                )
            choice = choices[key] = choices.get(key, -1) + 1
            scores.append((record["loglikelihoods"][choice], record["greedy"][choice]))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [math.fsum(record["loglikelihoods"]) for _, record in self._records(requests)]

    def _records(self, requests: list[Instance]) -> Iterator[tuple[str, Record]]:
        """(key, stored record) of each request."""
        for instance in requests:
            number, prompt = instance.doc_id, instance.args[0]
            if self._documents is not None:  # lm-eval counts those alone
                number = self._documents[instance.task_name][number]
            key = f"{instance.task_name}/{number}"
            record = self._samples.get(key)
            if record is None:
                raise ConfigError(f"{self._folder} holds no answer to {key}; its task or data have changed since")
            # of a conversation only the last question is known here
            is_same = prompt.strip() in record["prompt"] if self._chat else prompt == record["prompt"]
            if self._documents is not None:  # another harness may have asked in other words
                is_same = is_same or question_in(instance.doc, record["prompt"])
            if not is_same:
                raise ConfigError(f"{self._folder}: the prompt of {key} has changed since it was answered")
            yield key, record


def rescore(folder: Path, profile: str, out: Path | None = None, *, data_dir: str | None = None) -> tuple[Nested, Path]:
    """Score a finished run's answers by a profile's extractors. Returns the result and its folder.

    out: default: beside the run, NAME-read-as-PROFILE.  data_dir: of the targets; default: where the run had them.
    Raises ConfigError if the folder holds no finished run, the profile has no extractor for any of its tasks, or the
    prompts have changed since.
    """
    # 1) the finished run
    if (folder / POINTS).is_dir():
        raise ConfigError(f"{folder}: a sweep, not a run; name one of the run folders in {folder / POINTS}")
    run_spec = held_spec(folder) if folder.is_dir() else None
    if run_spec is None or not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: no finished run here (no {RESULT})")
    # 2) the same spec with the other profile's extractors, where it has any
    reader = profiles.read_profile(profile)
    current = run_spec.extractor or run_spec.profile
    extractor = None if profile == run_spec.profile else profile
    spec = replace(run_spec, extractor=extractor, data_dir=data_dir or run_spec.data_dir)
    catalogue(run_spec.tasks_dir).check(run_spec.tasks)
    tasks = lm_eval_tasks.load_tasks(spec)
    affected = [name for name in tasks["tasks"] if _has_extractor(name, profile) or _has_extractor(name, current)]
    if profile != current and not affected:
        raise ConfigError(
            f"profile {reader.name} has no extractor of its own for {', '.join(run_spec.tasks)}: scores would be equal"
        )
    # 3) score, and describe the result as a run of its own
    clock, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    opened = Run(out or folder.with_name(f"{folder.name}-read-as-{reader.name}"), spec, resume=False)
    records, before = _scored(folder, spec, tasks), read_result(folder / RESULT, ("notices",))
    result = {
        **result_of(spec, tasks, records, before.get("chat"), speed_repeats.read(folder)),
        **({"conditions": before["conditions"]} if "conditions" in before else {}),
        "started": started,
        "remote_code": before.get("remote_code", []),
        "notices": [*before["notices"], *_notices(folder, run_spec, reader, affected)],
    }
    # 4) store it
    opened.begin({**read_environment(folder / ENVIRONMENT), "rescored": {"from": str(folder), "started": started}})
    result["wall_seconds"] = round(time.perf_counter() - clock, 3)
    if (folder / speed_repeats.REPEATS).is_file():
        shutil.copyfile(folder / speed_repeats.REPEATS, opened.folder / speed_repeats.REPEATS)
    opened.finish(records, result)
    return result, opened.folder


def _scored(folder: Path, spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> list[Record]:
    """The run's records with the scores of these tasks' extractors."""
    samples = {record["key"]: record for record in read_samples(folder)}
    documents: dict[str, list[int]] | None = None
    if "imported" in read_environment(folder / ENVIRONMENT):
        answered = sorted((record["task"], record["doc_id"]) for record in samples.values() if "lost" not in record)
        documents = {name: [n for task, n in answered if task == name] for name in tasks["tasks"]}
    stored = StoredLM(samples, folder, chat=spec.chat is not None, documents=documents)
    results = lm_eval_tasks.evaluate(spec, tasks, stored, documents=documents)
    return lm_eval_tasks.scored_records(tasks, results, samples)


def _has_extractor(task: str, profile: str) -> bool:
    protocol = profiles.read_profile(profile).of(task)
    return protocol is not None and protocol.extractor is not None


PROMPT_FIELDS = (
    *("num_fewshot", "description", "doc_to_text", "fewshot_config", "gen_prefix"),
    *("until", "max_gen_toks", "chat"),
)
"""Fields of a profile that shape the answers, so that stored ones cannot follow them."""


def _notices(folder: Path, run_spec: RunSpec, reader: profiles.Profile, affected: list[str]) -> list[str]:
    """Which parts of the profile were applied, and which would need new answers."""
    # 1) applied: the extractors
    protocols = {name: reader.of(name) for name in affected}
    extractors = {p.extractor.about if p and p.extractor else "lm-eval's" for p in protocols.values()}
    how = f" ({'; '.join(sorted(extractors))})" if extractors else ""
    notices = [f"answers of {folder}, not written again, read by the extractors of {reader.name}{how}"]
    # 2) not applied: prompts and stops
    unused = [
        name for name in PROMPT_FIELDS if any(p and getattr(p, name) is not None for p in protocols.values())
    ]  # fmt: skip
    if unused and reader.name != profiles.read_profile(run_spec.profile).name:
        notices.append(f"of {reader.name} not applied, since it would need new answers: {', '.join(unused)}")
    return notices
