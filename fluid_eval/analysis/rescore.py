"""Stored answers read by another profile's extractors: nothing is written by a model again, none is loaded.

Prompts, stops, lengths and the decoder stay those of the run; what comes out is a run folder like any other, whose
protocol says so ("lm-eval prompts, fluid-paper extractors").
"""

from __future__ import annotations

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
from ..common.spec import RunSpec
from ..results import speed_repeats
from ..results.run_folder import ENVIRONMENT, POINTS, RESULT, Record, Run, held_spec, read_samples
from ..results.stored_values import read_environment, read_result
from ..running.job import result_of


class StoredLM(LM):
    """Answers from a run's samples. Raises ConfigError where a question is not the one that was answered."""

    tokenizer_name = ""

    def __init__(self, samples: Mapping[str, Record], folder: Path, *, chat: bool) -> None:
        super().__init__()
        self._samples = samples
        self._folder = folder
        self._chat = chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The last question: the template is the model's, and no model is here."""
        return next(turn["content"] for turn in reversed(chat_history) if turn["role"] == "user")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [str(record["output"]) for _, record in self._records(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        places: dict[str, int] = {}
        found = []
        for key, record in self._records(requests):
            place = places[key] = places.get(key, -1) + 1
            found.append((record["loglikelihoods"][place], record["greedy"][place]))
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise ConfigError(f"{self._folder}: likelihoods of whole texts are not stored and cannot be scored again")

    def _records(self, requests: list[Instance]) -> Iterator[tuple[str, Record]]:
        for instance in requests:
            key, asked = f"{instance.task_name}/{instance.doc_id}", instance.args[0]
            record = self._samples.get(key)
            if record is None:
                raise ConfigError(f"{self._folder} holds no answer to {key}; its task or data have changed since")
            same = asked.strip() in record["prompt"] if self._chat else asked == record["prompt"]
            if not same:
                raise ConfigError(f"{self._folder}: the question of {key} is not the one that was answered")
            yield key, record


def rescore(folder: Path, profile: str, out: Path | None = None, *, data_dir: str | None = None) -> tuple[Nested, Path]:
    """Score a finished run's answers by a profile's extractors; returns the result and its folder.

    out: default: beside the run, NAME-read-as-PROFILE.  data_dir: where the targets are, if not where the run had them.
    Raises ConfigError if the folder holds no finished run, the profile has no extractor for any of its tasks, or the
    questions have changed since.
    """
    if (folder / POINTS).is_dir():
        raise ConfigError(f"{folder}: a sweep, not a run; name one of the run folders in {folder / POINTS}")
    held = held_spec(folder) if folder.is_dir() else None
    if held is None or not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: no finished run here (no {RESULT})")
    reader = profiles.read_profile(profile)
    own = held.extractor or held.profile
    spec = replace(held, extractor=None if profile == held.profile else profile, data_dir=data_dir or held.data_dir)
    lm_eval_tasks.check_names(held.tasks)
    tasks = lm_eval_tasks.load_tasks(spec)
    reads = [name for name in tasks["tasks"] if _extracts(name, profile) or _extracts(name, own)]
    if profile != own and not reads:
        raise ConfigError(
            f"profile {reader.name} has no extractor of its own for {', '.join(held.tasks)}: scores would be the same"
        )
    clock, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    opened = Run(out or folder.with_name(f"{folder.name}-read-as-{reader.name}"), spec, resume=False)
    records, before = _scored(folder, spec, tasks), read_result(folder / RESULT, ("notices",))
    result = {
        **result_of(spec, tasks, records, before.get("chat"), speed_repeats.read(folder)),
        **({"conditions": before["conditions"]} if "conditions" in before else {}),
        "started": started,
        "remote_code": before.get("remote_code", []),
        "notices": [*before["notices"], *_notices(folder, held, reader, reads)],
    }
    opened.begin({**read_environment(folder / ENVIRONMENT), "rescored": {"from": str(folder), "started": started}})
    result["wall_seconds"] = round(time.perf_counter() - clock, 3)
    if (folder / speed_repeats.REPEATS).is_file():
        shutil.copyfile(folder / speed_repeats.REPEATS, opened.folder / speed_repeats.REPEATS)
    opened.finish(records, result)
    return result, opened.folder


def _scored(folder: Path, spec: RunSpec, tasks: lm_eval_tasks.Tasks) -> list[Record]:
    samples = {record["key"]: record for record in read_samples(folder)}
    results = lm_eval_tasks.evaluate(spec, tasks, StoredLM(samples, folder, chat=spec.chat is not None))
    return lm_eval_tasks.scored_records(tasks, results, samples)


def _extracts(task: str, profile: str) -> bool:
    told = profiles.read_profile(profile).of(task)
    return told is not None and told.extractor is not None


def _notices(folder: Path, held: RunSpec, reader: profiles.Profile, reads: list[str]) -> list[str]:
    """What of the profile was applied, and what would have needed new answers."""
    told = {name: reader.of(name) for name in reads}
    abouts = {t.extractor.about if t and t.extractor else "lm-eval's" for t in told.values()}
    how = f" ({'; '.join(sorted(abouts))})" if abouts else ""
    found = [f"answers of {folder}, not written again, read by the extractors of {reader.name}{how}"]
    asked = (
        "num_fewshot",
        "description",
        "doc_to_text",
        "fewshot_config",
        "gen_prefix",
        "until",
        "max_gen_toks",
        "chat",
    )
    left = [name for name in asked if any(t and getattr(t, name) is not None for t in told.values())]
    if left and reader.name != profiles.read_profile(held.profile).name:
        found.append(f"of {reader.name} not applied, since it would need new answers: {', '.join(left)}")
    return found
