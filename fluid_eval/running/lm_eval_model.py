"""lm-eval's model interface over our workers: answers come from the run folder or, if missing there, from the pool.

A generation request, from lm-eval's Instance to the stored sample (gsm8k, document 0):

    Instance("generate_until", doc, arguments=("Question: Janet's ducks lay 16 eggs …\\nAnswer:",
             {"until": ["Question:", "</s>"], "max_gen_toks": 512, "do_sample": False}))
        │ _generation_work: encode the prompt, cut it from the left to the window
        ▼
    Request(key="gsm8k/0", prompt=(1, 16492, …), max_new_tokens=512, stops=("Question:", "</s>"), seed=…, truncated=0)
        │ pool.run: chunks to workers, answers in any order
        ▼
    Generation(key="gsm8k/0", ids=(2296, …), text=" She sells 9 eggs …", finish="stop", trace=…, seconds=0.8)
        │ store: one line in samples.jsonl
        ▼
    {"key": "gsm8k/0", "prompt": "Question: …", "output": " She sells 9 eggs …", "output_ids": [2296, …], …}

The Instances of one likelihood question (one a choice) become one ScoreRequest. A stored sample of the same prompt is
not asked again. lm-eval sees rank 0 of 1: parallelism lies in the pool.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fluid_model.common.errors import ConfigError
from fluid_model.engine.records import Generation, Request, Score, ScoreRequest
from fluid_model.tokens import Tokenizer, encodable

from ..benchmarks.chat_template import Chat
from ..common.progress import ProgressBar
from ..common.spec import RunSpec
from ..results.sample_records import Record
from .answer_records import failed_record, generation_record, likelihood_record, prompt_hash
from .chunks import FailedRequest, Pool, chunks_of

if TYPE_CHECKING:
    from .worker import Answer, Work

Ids = tuple[int, ...]
ENCODE_AT_ONCE = 2048
"""Prompts in one call of the tokenizer."""


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


class FluidLM(TemplateLM):
    """Answers lm-eval's requests from the run folder or, if missing there, from the pool.

    run: the run folder, or another store of answers.
    window: the model's, in tokens.  pool: opens the workers, called when the first answer is missing.
    chat: None for plain prompts.  encoded: token ids by text, shared between runs with one tokenizer.
    on_text: called with task, document and text of each generated answer; after all answers, or `at_once`.
    """

    at_once = False
    """Whether `on_text` is called as answers arrive. It starts tests of programs, which on a CPU slow the workers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: int,
        pool: Callable[[], Pool],
        run: AnswerStore,
        bar: Callable[[str, int], ProgressBar],
        chat: Chat | None = None,
        encoded: dict[str, Ids] | None = None,
        on_text: Callable[[str, dict[str, Any], str], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_text = on_text
        self._encoded = {} if encoded is None else encoded
        self.tokenizer = tokenizer
        self._window = window
        self._pool = pool
        self._run = run
        self._bar = bar
        self._chat = chat
        self._prompts: dict[str, str | list[tuple[str, str]]] = {}
        """Of each pending request: its prompt, or its (context, continuation) pairs."""
        self._documents: dict[str, tuple[str, dict[str, Any]]] = {}
        """Of each pending generation: its task and document."""
        self._end_of_thinking = chat.cut if chat else None
        self._eos = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("this tokenizer has neither BOS nor EOS token: nothing can stand for an empty prompt")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self._chat is not None, "lm-eval asks only where the run is a chat"
        return self._chat.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            return list(self._encode_all([string])[string])
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def missing(self, requests: Sequence[Instance]) -> list[Work]:
        """Work for those of the requests that the run has no sample of; `store` takes the answers."""
        return [
            *self._generation_work(_of_type(requests, "generate_until"))[1],
            *self._likelihood_work(_of_type(requests, "loglikelihood"))[1],
            *self._rolling_work(_of_type(requests, "loglikelihood_rolling"))[1],
        ]

    def store(self, answer: Answer | FailedRequest) -> None:
        """Append the answer to a pending request to the run folder."""
        prompt = self._prompts.pop(answer.key)
        document = self._documents.pop(answer.key, None)
        if isinstance(answer, FailedRequest):
            self._run.append(failed_record(answer, prompt))
        elif isinstance(answer, Generation):
            self._run.append(generation_record(answer, str(prompt), self.tokenizer, self._end_of_thinking))
            if self.at_once and self._on_text is not None and document is not None:
                self._on_text(*document, answer.text)
        else:
            self._run.append(likelihood_record(answer, list(prompt)))  # type: ignore[arg-type]  # a Score has pairs

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

    def to_time(self, requests: Sequence[Instance]) -> list[Request]:
        """Generation requests to time again: all, stored or not, but those that failed."""
        generations = _of_type(requests, "generate_until")
        prompts = self._encode_all(instance.args[0] for instance in generations)
        return [
            self._request(key, prompts[instance.args[0]], dict(instance.args[1]), len(generations))
            for key, instance in zip(keys_of(generations), generations, strict=True)
            if key in self._run.samples
        ]

    def _generation_work(self, requests: Sequence[Instance]) -> tuple[list[str], list[Request]]:
        """Keys of all requests, and work for those without a stored sample."""
        prompts = self._encode_all(instance.args[0] for instance in requests)
        keys = keys_of(requests)
        work = []
        for key, instance in zip(keys, requests, strict=True):
            text, options = instance.args
            if not self._is_stored(key, text):
                work.append(self._request(key, prompts[text], dict(options), len(requests)))
                self._prompts[key] = text
                self._documents[key] = instance.task_name, instance.doc
            elif self._on_text is not None:
                self._on_text(instance.task_name, instance.doc, self._run.samples[key]["output"])
        return keys, work

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

    def _likelihood_work(self, requests: Sequence[Instance]) -> tuple[dict[str, list[Instance]], list[ScoreRequest]]:
        """Choices of each question by key, and work for the questions without a stored sample."""
        questions: dict[str, list[Instance]] = {}
        for instance in requests:
            questions.setdefault(f"{instance.task_name}/{instance.doc_id}", []).append(instance)
        missing = {key: choices for key, choices in questions.items() if not self._is_stored(key, choices[0].args[0])}
        pairs = self._encode_pairs([instance.args for choices in missing.values() for instance in choices])
        work = []
        for key, choices in missing.items():
            self._prompts[key] = [instance.args for instance in choices]
            encoded = tuple(pairs[instance.args] for instance in choices)
            work.append(ScoreRequest(key, encoded, row_seed(self._run.spec.seed, key)))
        return questions, work

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as wide as the model's. Each token is predicted once."""
        keys, work = self._rolling_work(requests)
        self._answer("scoring", keys, work)
        return [math.fsum(self._run.samples[key]["loglikelihoods"]) for key in keys]

    def _rolling_work(self, requests: Sequence[Instance]) -> tuple[list[str], list[ScoreRequest]]:
        """Keys of all texts, and work for those without a stored sample: the windows of one are its "choices"."""
        keys, work = keys_of(requests), []
        for key, instance in zip(keys, requests, strict=True):
            (text,) = instance.args
            if self._is_stored(key, text):
                continue
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._window,
                context_len=1,
            )
            pairs = tuple((tuple(context), tuple(ids)) for context, ids in map(make_disjoint_window, windows))
            if not pairs:
                raise ConfigError(f"{key} is an empty text, which has no likelihood; take it out of the data")
            self._prompts[key] = [(text, "")] * len(pairs)
            work.append(ScoreRequest(key, pairs, row_seed(self._run.spec.seed, key)))
        return keys, work

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        work = [ScoreRequest(str(n), ((tuple(c), tuple(t)),)) for n, (_texts, c, t) in enumerate(requests)]
        scores = {answer.key: answer for answer in self._answers(work) if isinstance(answer, Score)}
        return [(scores[item.key].loglikelihoods[0], scores[item.key].greedy[0]) for item in work]

    def _is_stored(self, key: str, prompt: str) -> bool:
        """Whether the run has this sample. Raises ConfigError if it answers another prompt."""
        stored_hash = self._run.samples.prompt_hash(key)
        if stored_hash is not None and stored_hash != prompt_hash(prompt):
            raise ConfigError(f"{self._run.folder}: the prompt of {key} is not the one stored; start another run")
        return stored_hash is not None

    def _request(self, key: str, prompt: Ids, options: dict[str, Any], asked: int) -> Request:
        """A generation request. The prompt is cut from the left so that the answer fits the window.

        options: lm-eval's generation kwargs.  asked: generation requests of the run, for the draft policy.
        """
        settings = normalize_gen_kwargs(options)
        stops = handle_stop_sequences(settings["until"], eos=self._eos)
        room = self._window - self._run.spec.decoder.answer_slots(settings["max_gen_toks"])
        fitting = (prompt or (self.prefix_token_id,))[-room:]
        return Request(
            key=key,
            prompt=fitting,
            max_new_tokens=settings["max_gen_toks"],
            stops=tuple(stops),
            seed=row_seed(self._run.spec.seed, key),
            truncated=max(0, len(prompt) - len(fitting)),
            end_of_thinking=self._end_of_thinking,
            asked=asked,
        )

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

    def _encode_all(self, texts: Iterable[str]) -> dict[str, Ids]:
        """Token ids by text."""
        texts = dict.fromkeys(texts)
        distinct = [text for text in texts if text not in self._encoded]
        self._encoded |= encode_prompts(self.tokenizer, distinct, chat=self._chat is not None)
        return {text: self._encoded[text] for text in texts}

    def _encode_pairs(self, texts: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[Ids, Ids]]:
        """Context and continuation ids, split as lm-eval does: encode both as one text, cut at the context's length."""
        # 1) trailing white space of the context belongs to the continuation
        split = {}
        for context, continuation in texts:
            stripped = context.rstrip()
            split[context, continuation] = stripped, context[len(stripped) :] + continuation
        contexts = [context for context, _ in split.values() if context]
        joined = [context + continuation for context, continuation in split.values() if context]
        encoded = self._encode_all(contexts + joined)
        # 2) cut; an empty context is the prefix token alone
        pairs = {}
        for args, (context, continuation) in split.items():
            if context:
                context_ids, both_ids = encoded[context], encoded[context + continuation]
                pairs[args] = context_ids, both_ids[len(context_ids) :]
            else:
                ids = tuple(self.tok_encode(continuation, add_special_tokens=False))
                prefix = (self.prefix_token_id,)
                pairs[args] = (ids[:1], ids[1:]) if ids[:1] == prefix else (prefix, ids)
        return pairs


def _of_type(requests: Sequence[Instance], request_type: str) -> list[Instance]:
    return [instance for instance in requests if instance.request_type == request_type]


def keys_of(requests: Sequence[Instance]) -> list[str]:
    """Sample keys: TASK/DOCUMENT, and TASK/DOCUMENT/2, /3 … for further answers to one document."""
    seen: Counter[str] = Counter()
    keys = []
    for instance in requests:
        key = f"{instance.task_name}/{instance.doc_id}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}/{seen[key]}")
    return keys


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, chat: bool) -> dict[str, Ids]:
    """Token ids of distinct prompts.

    The tokenizer adds its special tokens unless the text starts with BOS or is a chat prompt, whose template decides.
    Raises ConfigError if a prompt starts with two BOS.
    """
    encoded: dict[str, Ids] = {}
    bos_id = tokenizer.bos_token_id
    first_id = bos_id if bos_id is not None else tokenizer.eos_token_id
    bos = "" if first_id is None else tokenizer.decode(first_id)
    # 1) texts with and without a BOS of their own are encoded apart
    with_bos = [text for text in texts if bos and has_bos_prefix(text, bos)]
    without_bos = [text for text in texts if not (bos and has_bos_prefix(text, bos))]
    for group, add_special_tokens in ((without_bos, not chat), (with_bos, False)):
        for start in range(0, len(group), ENCODE_AT_ONCE):
            part = group[start : start + ENCODE_AT_ONCE]
            ids = tokenizer([encodable(text) for text in part], add_special_tokens=add_special_tokens)["input_ids"]
            encoded.update(zip(part, map(tuple, ids), strict=True))
    # 2) a template or task text that writes BOS where the tokenizer adds one
    if bos_id is not None and any(ids[:2] == (bos_id, bos_id) for ids in encoded.values()):
        where = "the model's chat template" if chat else "the task's text"
        raise ConfigError(f"a prompt starts with {bos} twice, as written by {where}; take one out there")
    return encoded


def row_seed(seed: int, key: str) -> int:
    """The seed of one row: its random numbers do not depend on the rows that share its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7])
