"""Records of samples from answers: generated, likelihood and failed. `results.sample_records` documents the fields."""

from __future__ import annotations

import hashlib
import math

from fluid_model.engine.records import Generation, Score, Trace
from fluid_model.tokens import Tokenizer, decode_pieces

from ..results.sample_records import Record
from .chunks import FailedRequest


def prompt_hash(prompt: str) -> str:
    """The first 16 hex digits of a prompt's SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def base_record(answer: Generation | Score, prompt: str) -> Record:
    """Fields common to all records. "broken" marks a non-finite row."""
    task, doc_id = answer.key.split("/")[:2]
    if isinstance(answer, Generation):
        is_finite = answer.finish != "broken"
    else:
        is_finite = not any(map(math.isnan, answer.loglikelihoods))
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
        **({} if is_finite else {"broken": True}),
    }


def generation_record(answer: Generation, prompt: str, tokenizer: Tokenizer, end_of_thinking: str | None) -> Record:
    """The record of a generated answer, its tokens and rejected draft tokens spelled out.

    end_of_thinking: text that ends the thinking, None if thinking is not cut off.
    """
    drafts = [(place, ids) for _, place, ids in answer.trace.rejected]
    pieces, rejected = decode_pieces(tokenizer, answer.ids, drafts)
    record = {
        **base_record(answer, prompt),
        "output": answer.text,
        "output_ids": list(answer.ids),
        "pieces": pieces,
        "rejected": rejected,
        "finish": answer.finish,
    }
    if answer.draft_policy is not None:
        record["draft_policy"] = answer.draft_policy.to_dict()
    if end_of_thinking is not None:
        record["raw_output"] = tokenizer.decode(answer.ids)
        record["thinking_ended"] = end_of_thinking in record["raw_output"]
    return record


def failed_record(failed: FailedRequest, prompt: str | list[tuple[str, str]]) -> Record:
    """The record of a failed request: "lost" holds the reason. It has no answer and enters no score."""
    empty = Score(failed.key, (0.0,) * len(prompt), (False,) * len(prompt), Trace(), 0.0)
    if isinstance(prompt, str):
        return {**base_record(empty, prompt), "output": "", "output_ids": [], "finish": "lost", "lost": failed.reason}
    return {**likelihood_record(empty, prompt), "output": "", "lost": failed.reason}


def likelihood_record(answer: Score, args: list[tuple[str, str]]) -> Record:
    """The record of a likelihood question. args: (context, continuation) of each choice; output: the likeliest."""
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
