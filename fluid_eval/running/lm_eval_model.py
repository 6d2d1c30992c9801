"""lm-eval's model interface over our workers, in token ids. What it shares with other writers: `answering_lm`.

A generation request, from lm-eval's Instance to the stored sample (gsm8k, document 0):

    Instance("generate_until", doc, arguments=("Question: Janet's ducks lay 16 eggs …\\nAnswer:",
             {"until": ["Question:", "</s>"], "max_gen_toks": 512, "do_sample": False}))
        │ _generations: encode the prompt, cut it from the left to the window
        ▼
    Request(key="gsm8k/0", prompt=(1, 16492, …), max_new_tokens=512, stops=("Question:", "</s>"), seed=…, truncated=0)
        │ pool.run: chunks to workers, answers in any order
        ▼
    Generation(key="gsm8k/0", ids=(2296, …), text=" She sells 9 eggs …", finish="stop", trace=…, seconds=0.8)
        │ store: one line in samples.jsonl
        ▼
    {"key": "gsm8k/0", "prompt": "Question: …", "output": " She sells 9 eggs …", "output_ids": [2296, …], …}

The Instances of one likelihood question (one a choice) become one ScoreRequest. A stored sample of the same prompt is
not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fluid_model.common.errors import ConfigError
from fluid_model.engine.records import Generation, Request, Score, ScoreRequest
from fluid_model.tokens import Tokenizer, encodable

from ..benchmarks.chat_template import Chat
from ..common.progress import ProgressBar
from ..results.sample_records import Record
from .answer_records import failed_record, generation_record, likelihood_record
from .answering_lm import AnsweringLM, AnswerStore, Prompt, row_seed
from .chunks import FailedRequest, Pool

Ids = tuple[int, ...]
ENCODE_AT_ONCE = 2048
"""Prompts in one call of the tokenizer."""


class FluidLM(AnsweringLM, TemplateLM):
    """Answers lm-eval's requests by a checkpoint and a decoder of this package.

    window: the model's, in tokens.  chat: None for plain prompts.
    encoded: token ids by text, shared between runs with one tokenizer.  Others: see `AnsweringLM`.
    """

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
        super().__init__(pool, run, bar, on_text)
        self._encoded = {} if encoded is None else encoded
        self.tokenizer = tokenizer
        self._window = window
        self._chat = chat
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

    def _generations(self, missing: Mapping[str, Instance], asked: int) -> Sequence[Request]:
        prompts = self._encode_all(instance.args[0] for instance in missing.values())
        return [
            self._request(key, prompts[instance.args[0]], dict(instance.args[1]), asked)
            for key, instance in missing.items()
        ]

    def _questions(self, missing: Mapping[str, Sequence[Instance]]) -> Sequence[ScoreRequest]:
        pairs = self._encode_pairs([instance.args for choices in missing.values() for instance in choices])
        work = []
        for key, choices in missing.items():
            encoded = tuple(pairs[instance.args] for instance in choices)
            work.append(ScoreRequest(key, encoded, row_seed(self._run.spec.seed, key)))
        return work

    def _whole_texts(self, missing: Mapping[str, Instance]) -> Mapping[str, tuple[ScoreRequest, int]]:
        work = {}
        for key, instance in missing.items():
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._window,
                context_len=1,
            )
            pairs = tuple((tuple(context), tuple(ids)) for context, ids in map(make_disjoint_window, windows))
            if not pairs:
                raise ConfigError(f"{key} is an empty text, which has no likelihood; take it out of the data")
            work[key] = ScoreRequest(key, pairs, row_seed(self._run.spec.seed, key)), len(pairs)
        return work

    def _record(self, answer: Generation | Score | FailedRequest, prompt: Prompt) -> Record:
        if isinstance(answer, FailedRequest):
            return failed_record(answer, prompt)
        if isinstance(answer, Generation):
            return generation_record(answer, str(prompt), self.tokenizer, self._end_of_thinking)
        return likelihood_record(answer, list(prompt))  # type: ignore[arg-type]  # a Score has pairs

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        work = [ScoreRequest(str(n), ((tuple(c), tuple(t)),)) for n, (_texts, c, t) in enumerate(requests)]
        scores = {answer.key: answer for answer in self._answers(work) if isinstance(answer, Score)}
        return [(scores[item.key].loglikelihoods[0], scores[item.key].greedy[0]) for item in work]

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
