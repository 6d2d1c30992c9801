"""lm-eval's model interface over another model of lm-eval's, whose answers are stored as those of any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from fluid_model.common.errors import ConfigError

from ..results.sample_records import UNKNOWN_TRACE, Record
from .answer_records import prompt_hash
from .answering_lm import AnsweringLM, Prompt
from .backend_pool import BackendPool, TextAnswer, TextRequest
from .chunks import FailedRequest


class BackendLM(AnsweringLM):
    """Answers lm-eval's requests by a backend: what is stored is not asked again. See `AnsweringLM`."""

    @property
    def tokenizer_name(self) -> str:
        """Of the backend, which renders chats."""
        return str(self._backend.lm.tokenizer_name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        """The prompt of a conversation, by the backend. Of a chat server: its messages."""
        try:
            return self._backend.lm.apply_chat_template(chat_history, add_generation_prompt)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(f"chat: the backend has no chat template ({error}); run it without --chat") from error

    @property
    def _backend(self) -> BackendPool:
        pool = self._pool()
        assert isinstance(pool, BackendPool), "a backend's run has a backend's pool"
        return pool

    def _generations(self, missing: Mapping[str, Instance], asked: int) -> Sequence[TextRequest]:
        return [TextRequest(key, (instance,)) for key, instance in missing.items()]

    def _questions(self, missing: Mapping[str, Sequence[Instance]]) -> Sequence[TextRequest]:
        return [TextRequest(key, tuple(choices)) for key, choices in missing.items()]

    def _whole_texts(self, missing: Mapping[str, Instance]) -> Mapping[str, tuple[TextRequest, int]]:
        return {key: (TextRequest(key, (instance,)), 1) for key, instance in missing.items()}

    def _record(self, answer: TextAnswer | FailedRequest, prompt: Prompt) -> Record:
        """The record of an answer: tokens and seconds as far as known, forwards unknown."""
        task, doc_id = answer.key.split("/")[:2]
        text = prompt if isinstance(prompt, str) else prompt[0][0]
        record: Record = {
            "key": answer.key, "task": task, "doc_id": int(doc_id), "prompt_hash": prompt_hash(text), "prompt": text,
            "prompt_tokens": None, "truncated": None, "trace": dict(UNKNOWN_TRACE),
        }  # fmt: skip
        if isinstance(answer, FailedRequest):
            lost = {"output": "", "output_ids": [], "finish": "lost", "lost": answer.reason, "seconds": 0.0}
            return {**record, **lost}
        record["seconds"] = answer.seconds
        if isinstance(prompt, str):
            counted = {} if answer.counted is None else {"counted": answer.counted}
            known = {"output": answer.text, "output_ids": None, "tokens": answer.tokens, "finish": answer.finish}
            return {**record, **known, **counted}
        values = [value for value, _ in answer.likelihoods]
        best = max(range(len(values)), key=values.__getitem__)
        return {
            **record, "output": prompt[best][1].strip(), "output_ids": [], "finish": None,
            "choices": [continuation for _, continuation in prompt], "loglikelihoods": values,
            "greedy": [greedy for _, greedy in answer.likelihoods],
        }  # fmt: skip
