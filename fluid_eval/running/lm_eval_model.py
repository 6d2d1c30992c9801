"""lm-eval's LM over our engine: drop what the run already holds, send the rest, keep answers as they come.

Towards lm-eval this is rank 0 of 1; parallelism lives below, in the pool.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fluid_model.common.errors import ConfigError
from fluid_model.engine.records import Generation, Request, Score, ScoreRequest, Trace
from fluid_model.settings import answer_slots
from fluid_model.tokens import Tokenizer, decode_pieces, encodable

from ..benchmarks.chat_template import Chat
from ..common.progress import Bar
from ..results.run_folder import Record, Run
from .workers import Lost, Pool, chunks_of

if TYPE_CHECKING:
    from .worker import Answer, Work

Ids = tuple[int, ...]
ENCODE_AT_ONCE = 2048


class FluidLM(TemplateLM):
    """Answers lm-eval's requests from the run folder or, where it has none, from the pool.

    pool: called once, when the first answer is missing.  window: tokens the model can read.  chat: None for plain
    prompts.  encoded: ids by text, shared by those that have the same tokenizer and ask the same.  written: told of
    each answer, its task, document and text: when all are written, or `at_once`.
    """

    at_once = False
    """Whether who is told of an answer may work beside those who write the next: not where they share processors."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        window: int,
        pool: Callable[[], Pool],
        run: Run,
        bar: Callable[[str, int], Bar],
        chat: Chat | None = None,
        encoded: dict[str, Ids] | None = None,
        written: Callable[[str, dict[str, Any], str], None] | None = None,
    ) -> None:
        super().__init__()
        self._tell = written
        self._documents: dict[str, tuple[str, dict[str, Any]]] = {}
        self._encoded = {} if encoded is None else encoded
        self.tokenizer = tokenizer
        self._window = window
        self._pool = pool
        self._run = run
        self._bar = bar
        self._chat = chat
        self._asked: dict[str, str | list[tuple[str, str]]] = {}
        self._end_of_thinking = chat.cut if chat else None
        self._eos = None if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("this tokenizer has neither BOS nor EOS token: nothing can stand for an empty prompt")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

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
        """What of these requests the run does not hold yet; `keep` takes the answers."""
        writes = [instance for instance in requests if instance.request_type == "generate_until"]
        scores = [instance for instance in requests if instance.request_type == "loglikelihood"]
        return [*self._to_write(writes)[1], *self._to_score(scores)[1]]

    def keep(self, answer: Answer | Lost) -> None:
        """Store an answer to what `missing` asked for."""
        asked, document = self._asked.pop(answer.key), self._documents.pop(answer.key, None)
        if isinstance(answer, Lost):
            self._run.append(_lost(answer, asked))
        elif isinstance(answer, Generation):
            self._run.append(self._written(answer, str(asked)))
            if self.at_once and self._tell is not None and document is not None:
                self._tell(*document, answer.text)
        else:
            self._run.append(_scored(answer, list(asked)))  # type: ignore[arg-type]  # pairs, where likelihoods are asked

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts before their stop strings, in request order."""
        keys, work = self._to_write(requests)
        self._work("writing", keys, work)
        texts = [self._run.samples[key]["output"] for key in keys]
        if self._tell is not None and not self.at_once:
            fresh = {item.key for item in work}
            for key, instance, text in zip(keys, requests, texts, strict=True):
                if key in fresh:
                    self._tell(instance.task_name, instance.doc, text)
        return texts

    def to_time(self, requests: Sequence[Instance]) -> list[Request]:
        """All that is written, held or not, but for samples that were given up."""
        writes = [instance for instance in requests if instance.request_type == "generate_until"]
        prompts = self._encode_all(instance.args[0] for instance in writes)
        return [
            self._request(key, prompts[instance.args[0]], dict(instance.args[1]), len(writes))
            for key, instance in zip(keys_of(writes), writes, strict=True)
            if key in self._run.samples
        ]

    def _to_write(self, requests: Sequence[Instance]) -> tuple[list[str], list[Request]]:
        """Keys of all, and what is missing."""
        prompts = self._encode_all(instance.args[0] for instance in requests)
        keys, work = keys_of(requests), []
        for key, instance in zip(keys, requests, strict=True):
            text, options = instance.args
            if not self._held(key, text):
                work.append(self._request(key, prompts[text], dict(options), len(requests)))
                self._asked[key] = text
                self._documents[key] = instance.task_name, instance.doc
            elif self._tell is not None:
                self._tell(instance.task_name, instance.doc, self._run.samples[key]["output"])
        return keys, work

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation; the choices of one question go together."""
        questions, work = self._to_score(requests)
        self._work("scoring", list(questions), work)
        found: dict[int, tuple[float, bool]] = {}
        for key, group in questions.items():
            record = self._run.samples[key]
            for instance, value, greedy in zip(group, record["loglikelihoods"], record["greedy"], strict=True):
                found[id(instance)] = value, greedy
        return [found[id(instance)] for instance in requests]

    def _to_score(self, requests: Sequence[Instance]) -> tuple[dict[str, list[Instance]], list[ScoreRequest]]:
        """Requests of each question by key, and the questions that are missing."""
        questions: dict[str, list[Instance]] = {}
        for instance in requests:
            questions.setdefault(f"{instance.task_name}/{instance.doc_id}", []).append(instance)
        missing = {k: group for k, group in questions.items() if not self._held(k, group[0].args[0])}
        pairs = self._encode_pairs([i.args for group in missing.values() for i in group])
        seed = self._run.spec.seed
        self._asked |= {key: [i.args for i in group] for key, group in missing.items()}
        return questions, [
            ScoreRequest(key, tuple(pairs[i.args] for i in group), row_seed(seed, key))
            for key, group in missing.items()
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as wide as the model's, each token predicted once."""
        totals = []
        for instance in requests:
            (text,) = instance.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._window,
                context_len=1,
            )
            parts = [((text, ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        work = [ScoreRequest(str(n), ((tuple(c), tuple(t)),)) for n, (_texts, c, t) in enumerate(requests)]
        found = {answer.key: answer for answer in self._answers(work) if isinstance(answer, Score)}
        return [(found[item.key].loglikelihoods[0], found[item.key].greedy[0]) for item in work]

    def _held(self, key: str, prompt: str) -> bool:
        """Whether the run holds this sample. Raises ConfigError if its prompt has changed since."""
        held = self._run.samples.prompt_hash(key)
        if held is not None and held != prompt_hash(prompt):
            raise ConfigError(f"{self._run.folder}: the prompt of {key} is not the one stored; start another run")
        return held is not None

    def _request(self, key: str, prompt: Ids, options: dict[str, Any], asked: int) -> Request:
        """Cut a prompt from the left so that its answer fits the window; say how much was cut. asked: in the run."""
        settings = normalize_gen_kwargs(options)
        stops = handle_stop_sequences(settings["until"], eos=self._eos)
        room = self._window - answer_slots(self._run.spec.decoder, settings["max_gen_toks"])
        fed = (prompt or (self.prefix_token_id,))[-room:]
        return Request(
            key=key,
            prompt=fed,
            max_new_tokens=settings["max_gen_toks"],
            stops=tuple(stops),
            seed=row_seed(self._run.spec.seed, key),
            truncated=max(0, len(prompt) - len(fed)),
            end_of_thinking=self._end_of_thinking,
            asked=asked,
        )

    def _written(self, answer: Generation, prompt: str) -> Record:
        drafts = [(place, ids) for _, place, ids in answer.trace.rejected]
        pieces, rejected = decode_pieces(self.tokenizer, answer.ids, drafts)
        record = {
            **base_record(answer, prompt),
            "output": answer.text,
            "output_ids": list(answer.ids),
            "pieces": pieces,
            "rejected": rejected,
            "finish": answer.finish,
        }
        if answer.draft_policy is not None:
            record["draft_policy"] = vars(answer.draft_policy)
        if self._end_of_thinking is not None:
            record["raw_output"] = self.tokenizer.decode(answer.ids)
            record["thinking_ended"] = self._end_of_thinking in record["raw_output"]
        return record

    def _work(self, title: str, keys: Sequence[str], work: Sequence[Work]) -> None:
        """Send missing work to the pool and store answers as they come."""
        with self._bar(title, len(keys)) as bar:
            bar.skip(len(keys) - len(work))
            if work:
                for answer in self._answers(work):
                    self.keep(answer)
                    bar.advance()

    def _answers(self, work: Sequence[Work]) -> Iterator[Answer | Lost]:
        pool = self._pool()
        for _, answer in pool.run(chunks_of(pool, "", self._run.spec, work)):
            yield answer

    def _encode_all(self, texts: Iterable[str]) -> dict[str, Ids]:
        """Token ids of distinct texts."""
        texts = dict.fromkeys(texts)
        distinct = [text for text in texts if text not in self._encoded]
        self._encoded |= encode_prompts(self.tokenizer, distinct, chat=self._chat is not None)
        return {text: self._encoded[text] for text in texts}

    def _encode_pairs(self, texts: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[Ids, Ids]]:
        """Context and continuation ids as lm-eval splits them: encode the whole, cut at the context's length."""
        split = {}
        for context, continuation in texts:
            bare = context.rstrip()
            split[context, continuation] = bare, context[len(bare) :] + continuation
        encoded = self._encode_all([c for c, _ in split.values() if c] + [c + t for c, t in split.values() if c])
        pairs = {}
        for args, (context, continuation) in split.items():
            if context:
                whole, head = encoded[context + continuation], encoded[context]
                pairs[args] = head, whole[len(head) :]
            else:
                tail = tuple(self.tok_encode(continuation, add_special_tokens=False))
                begin = (self.prefix_token_id,)
                pairs[args] = (tail[:1], tail[1:]) if tail[:1] == begin else (begin, tail)
        return pairs


def keys_of(requests: Sequence[Instance]) -> list[str]:
    """A sample's name, TASK/DOCUMENT, with a number behind it from a document's second answer on."""
    seen: Counter[str] = Counter()
    keys = []
    for instance in requests:
        key = f"{instance.task_name}/{instance.doc_id}"
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}/{seen[key]}")
    return keys


def prompt_hash(prompt: str) -> str:
    """16 hex digits that name a prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], *, chat: bool) -> dict[str, Ids]:
    """Token ids of distinct prompts. The tokenizer adds its special tokens unless the text has its own BOS or is a
    conversation: there the template decides, as in transformers.

    Raises ConfigError if a text starts with two BOS.
    """
    begin, encoded = tokenizer.bos_token_id, dict[str, Ids]()
    first = begin if begin is not None else tokenizer.eos_token_id
    bos = "" if first is None else tokenizer.decode(first)
    for has_bos in (False, True):
        group = [t for t in texts if bool(bos) and has_bos_prefix(t, bos) == has_bos]
        group = group if bos else [] if has_bos else list(texts)
        for start in range(0, len(group), ENCODE_AT_ONCE):
            part = group[start : start + ENCODE_AT_ONCE]
            clean = [encodable(text) for text in part]
            ids = tokenizer(clean, add_special_tokens=not has_bos and not chat)["input_ids"]
            encoded.update(zip(part, map(tuple, ids), strict=True))
    if begin is not None and any(ids[:2] == (begin, begin) for ids in encoded.values()):
        where = "the model's chat template" if chat else "the task's text"
        raise ConfigError(f"a prompt starts with {bos} twice, as written by {where}; take one out there")
    return encoded


def row_seed(seed: int, key: str) -> int:
    """A row's own seed, so that its random numbers do not depend on what runs beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7])


def base_record(answer: Generation | Score, prompt: str) -> Record:
    """What the record of any answer has."""
    task, doc_id = answer.key.split("/")[:2]
    if isinstance(answer, Generation):
        broken = answer.finish == "broken"
    else:
        broken = any(map(math.isnan, answer.loglikelihoods))
    return {
        "key": answer.key,
        "task": task,
        "doc_id": int(doc_id),
        "prompt_hash": prompt_hash(prompt),
        "prompt": prompt,
        "prompt_tokens": answer.prompt_tokens,
        "truncated": answer.truncated,
        "trace": vars(answer.trace),
        "seconds": answer.seconds,
        **({"broken": True} if broken else {}),
    }


def _lost(answer: Lost, asked: str | list[tuple[str, str]]) -> Record:
    """A sample that was given up: it has no answer and counts nowhere."""
    nothing = Score(answer.key, (0.0,) * len(asked), (False,) * len(asked), Trace(), 0.0)
    if isinstance(asked, str):
        return {**base_record(nothing, asked), "output": "", "output_ids": [], "finish": "lost", "lost": answer.reason}
    return {**_scored(nothing, asked), "output": "", "lost": answer.reason}


def _scored(answer: Score, args: list[tuple[str, str]]) -> Record:
    best = max(range(len(args)), key=lambda i: answer.loglikelihoods[i])
    return {
        **base_record(answer, args[0][0]),
        "output": args[best][1].strip(),
        "output_ids": [],
        "finish": None,
        "choices": [continuation for _, continuation in args],
        "loglikelihoods": list(answer.loglikelihoods),
        "standard_errors": list(answer.errors),
        "greedy": list(answer.greedy),
    }
