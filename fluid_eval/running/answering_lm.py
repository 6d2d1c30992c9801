"""What every writer of answers shares under lm-eval's model interface: keys, the run folder, what is still missing.

    Instance of lm-eval  ──▶ key; stored already? ──▶ Work for the pool ──▶ answer ──▶ one line of samples.jsonl

A subclass says how requests are made of Instances and records of answers: `FluidLM` (this package's decoders, in token
ids), `BackendLM` (another program, in text). lm-eval sees rank 0 of 1: parallelism lies in the pool.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from fluid_model.common.errors import ConfigError

from ..common.progress import ProgressBar
from ..common.spec import RunSpec
from ..results.sample_records import Record
from .answer_records import prompt_hash
from .chunks import FailedRequest, Pool, chunks_of

Work = Any
"""A request for the pool, and an answer below: of types that the subclass and its pool agree on. Both have a `key`."""
Answer = Any
Prompt = str | list[tuple[str, str]]
"""Of a request: its prompt, or its (context, continuation) pairs."""


class AnswersByKey(Protocol):
    """Stored records by key."""

    def __getitem__(self, key: str, /) -> Record: ...
    def __contains__(self, key: object, /) -> bool: ...
    def prompt_hash(self, key: str) -> str | None: ...


class AnswerStore(Protocol):
    """Where answers are kept: a run folder, or memory (`lm_eval_backend`)."""

    @property
    def folder(self) -> Path: ...
    @property
    def spec(self) -> RunSpec: ...
    @property
    def samples(self) -> AnswersByKey: ...
    def append(self, record: Record) -> None: ...


class AnsweringLM(LM):
    """Answers lm-eval's requests from the run folder or, if missing there, from the pool.

    run: the run folder, or another store of answers.  pool: opens the workers, called when the first answer is missing.
    on_text: called with task, document and text of each generated answer; after all answers, or `at_once`.
    """

    at_once = False
    """Whether `on_text` is called as answers arrive. It starts tests of programs, which on a CPU slow the workers."""

    def __init__(
        self,
        pool: Callable[[], Pool],
        run: AnswerStore,
        bar: Callable[[str, int], ProgressBar],
        on_text: Callable[[str, dict[str, Any], str], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_text = on_text
        self._pool = pool
        self._run = run
        self._bar = bar
        self._prompts: dict[str, Prompt] = {}
        """Of each pending request."""
        self._documents: dict[str, tuple[str, dict[str, Any]]] = {}
        """Of each pending generation: its task and document."""

    @abstractmethod
    def _generations(self, missing: Mapping[str, Instance], asked: int) -> Sequence[Work]:
        """Work for generation requests by key. asked: all of the run, stored ones too."""

    @abstractmethod
    def _questions(self, missing: Mapping[str, Sequence[Instance]]) -> Sequence[Work]:
        """Work for likelihood questions by key; each has one Instance a choice."""

    @abstractmethod
    def _whole_texts(self, missing: Mapping[str, Instance]) -> Mapping[str, tuple[Work, int]]:
        """Work for likelihoods of whole texts by key, and the number of windows that each is scored in."""

    @abstractmethod
    def _record(self, answer: Answer | FailedRequest, prompt: Prompt) -> Record:
        """The record of an answer."""

    def missing(self, requests: Sequence[Instance]) -> list[Work]:
        """Work for those of the requests that the run has no sample of; `store` takes the answers."""
        return [
            *self._generation_work(of_type(requests, "generate_until"))[1],
            *self._likelihood_work(of_type(requests, "loglikelihood"))[1],
            *self._rolling_work(of_type(requests, "loglikelihood_rolling"))[1],
        ]

    def store(self, answer: Answer | FailedRequest) -> None:
        """Append the answer to a pending request to the run folder."""
        document = self._documents.pop(answer.key, None)
        record = self._record(answer, self._prompts.pop(answer.key))
        self._run.append(record)
        if self.at_once and self._on_text is not None and document is not None and "lost" not in record:
            self._on_text(*document, record["output"])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its stop string, in request order."""
        keys, work = self._generation_work(requests)
        self._answer("writing", keys, work)
        texts = [self._run.samples[key]["output"] for key in keys]
        if self._on_text is not None and not self.at_once:
            new = {item.key for item in work}
            for key, instance, text in zip(keys, requests, texts, strict=True):
                if key in new:
                    self._on_text(instance.task_name, instance.doc, text)
        return texts

    def to_time(self, requests: Sequence[Instance]) -> Sequence[Work]:
        """Generation requests to time again: all, stored or not, but those that failed."""
        generations = of_type(requests, "generate_until")
        by_key = dict(zip(keys_of(generations), generations, strict=True))
        stored = {key: instance for key, instance in by_key.items() if key in self._run.samples}
        return self._generations(stored, len(generations))

    def _generation_work(self, requests: Sequence[Instance]) -> tuple[list[str], Sequence[Work]]:
        """Keys of all requests, and work for those without a stored sample."""
        keys = keys_of(requests)
        missing: dict[str, Instance] = {}
        for key, instance in zip(keys, requests, strict=True):
            text = text_of(instance.args[0])
            if not self._is_stored(key, text):
                missing[key] = instance
                self._prompts[key] = text
                self._documents[key] = instance.task_name, instance.doc
            elif self._on_text is not None:
                self._on_text(instance.task_name, instance.doc, self._run.samples[key]["output"])
        return keys, self._generations(missing, len(requests))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation, in request order."""
        questions, work = self._likelihood_work(requests)
        self._answer("scoring", list(questions), work)
        results: dict[int, tuple[float, bool]] = {}
        for key, choices in questions.items():
            record = self._run.samples[key]
            for instance, value, greedy in zip(choices, record["loglikelihoods"], record["greedy"], strict=True):
                results[id(instance)] = value, greedy
        return [results[id(instance)] for instance in requests]

    def _likelihood_work(self, requests: Sequence[Instance]) -> tuple[dict[str, list[Instance]], Sequence[Work]]:
        """Choices of each question by key, and work for the questions without a stored sample."""
        questions: dict[str, list[Instance]] = {}
        for instance in requests:
            questions.setdefault(f"{instance.task_name}/{instance.doc_id}", []).append(instance)
        missing = {
            key: choices
            for key, choices in questions.items()
            if not self._is_stored(key, text_of(choices[0].args[0]))
        }  # fmt: skip
        for key, choices in missing.items():
            self._prompts[key] = [(text_of(instance.args[0]), instance.args[1]) for instance in choices]
        return questions, self._questions(missing)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as wide as the model's. Each token is predicted once."""
        keys, work = self._rolling_work(requests)
        self._answer("scoring", keys, work)
        return [math.fsum(self._run.samples[key]["loglikelihoods"]) for key in keys]

    def _rolling_work(self, requests: Sequence[Instance]) -> tuple[list[str], Sequence[Work]]:
        """Keys of all texts, and work for those without a stored sample: the windows of one are its "choices"."""
        keys = keys_of(requests)
        by_key = dict(zip(keys, requests, strict=True))
        missing = {key: one for key, one in by_key.items() if not self._is_stored(key, one.args[0])}
        work = self._whole_texts(missing)
        for key, (_, windows) in work.items():
            self._prompts[key] = [(missing[key].args[0], "")] * windows
        return keys, [item for item, _ in work.values()]

    def _is_stored(self, key: str, prompt: str) -> bool:
        """Whether the run has this sample. Raises ConfigError if it answers another prompt."""
        stored_hash = self._run.samples.prompt_hash(key)
        if stored_hash is not None and stored_hash != prompt_hash(prompt):
            raise ConfigError(f"{self._run.folder}: the prompt of {key} is not the one stored; start another run")
        return stored_hash is not None

    def _answer(self, title: str, keys: Sequence[str], work: Sequence[Work]) -> None:
        """Send missing work to the pool and store answers as they arrive."""
        with self._bar(title, len(keys)) as bar:
            bar.skip(len(keys) - len(work))
            if work:
                for answer in self._answers(work):
                    self.store(answer)
                    bar.advance()

    def _answers(self, work: Sequence[Work]) -> Iterator[Answer | FailedRequest]:
        pool = self._pool()
        for _, answer in pool.run(chunks_of(pool, "", self._run.spec, work)):
            yield answer


def of_type(requests: Sequence[Instance], request_type: str) -> list[Instance]:
    """The requests of one of lm-eval's types."""
    return [instance for instance in requests if instance.request_type == request_type]


def text_of(prompt: Any) -> str:
    """A prompt's text; of a chat that a server renders, its messages as JSON (lm-eval's JsonChatStr)."""
    return str(getattr(prompt, "prompt", prompt))


def keys_of(requests: Sequence[Instance]) -> list[str]:
    """Sample keys: TASK/DOCUMENT, and TASK/DOCUMENT/2, /3 … for further answers to one document."""
    seen: Counter[str] = Counter()
    keys = []
    for instance in requests:
        key = f"{instance.task_name}/{instance.doc_id}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}/{seen[key]}")
    return keys


def row_seed(seed: int, key: str) -> int:
    """The seed of one row: its random numbers do not depend on the rows that share its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7])
