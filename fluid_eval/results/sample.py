"""One sample of a run with a type for each field, from its record in samples.jsonl. Neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .sample_records import Record, tokens_of


@dataclass(frozen=True)
class Sample:
    """One answer of a run, generated or chosen by likelihood.

    key: TASK/DOCUMENT, and /2, /3 … for further answers to one document.  doc_id: from 0.
    prompt: as the model got it, before `truncated` tokens were cut from the left.  prompt_tokens: after the cut.
    output: the text up to the stop string or end token, of likelihood tasks the likeliest choice.
    output_ids: its token ids; none of likelihood tasks.
    target: the task's reference answer.  extracted: the answer that was scored, by lm-eval filter.
    scores: 0 to 1, by "METRIC,FILTER".
    finish: eos, stop, length, broken (a non-finite row), lost (the request failed); None of likelihood tasks.
    failure: why the request failed, None otherwise.
    forwards: number by kind, prefill included.  slots: token positions fed in all of them.
    predicted, accepted: tokens drafted and tokens accepted, of each speculative step.
    seconds: its share of the engine's time.
    Of an answer that another program wrote, None is what is unknown: output_ids, tokens, forwards, slots, seconds.
    choices, loglikelihoods: of likelihood tasks, one of each a choice; nats.
    """

    key: str
    task: str
    doc_id: int
    prompt: str
    prompt_tokens: int | None
    truncated: int | None
    output: str
    output_ids: tuple[int, ...] | None
    target: str | None
    extracted: Mapping[str, str]
    scores: Mapping[str, float]
    finish: str | None
    failure: str | None
    forwards: Mapping[str, int] | None
    slots: int | None
    predicted: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float | None
    tokens: int | None = None
    """Tokens of the answer."""
    choices: tuple[str, ...] = ()
    loglikelihoods: tuple[float, ...] = ()

    @classmethod
    def from_record(cls, record: Record) -> Sample:
        """The sample of a record, as `read_samples` gives it."""
        trace = record["trace"]
        return cls(
            **{name: record[name] for name in ("key", "task", "doc_id", "prompt", "output", "finish", "seconds")},
            prompt_tokens=record.get("prompt_tokens", 0),
            truncated=record.get("truncated", 0),
            output_ids=None if record["output_ids"] is None else tuple(record["output_ids"]),
            tokens=tokens_of(record),
            target=record.get("target"),
            extracted=record.get("extracted", {}),
            scores=record.get("scores", {}),
            failure=record.get("lost"),
            forwards=trace["forwards"],
            slots=trace["slots"],
            predicted=tuple(trace["predicted"]),
            accepted=tuple(trace["accepted"]),
            choices=tuple(record.get("choices", ())),
            loglikelihoods=tuple(record.get("loglikelihoods", ())),
        )

    @property
    def tokens_per_forward(self) -> float | None:
        """Tokens per forward, prefill counted; None where nothing was generated, or one of both is unknown."""
        forwards = sum((self.forwards or {}).values())
        return self.tokens / forwards if self.tokens and forwards else None
