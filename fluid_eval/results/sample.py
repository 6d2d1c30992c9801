"""One sample of a run with a type for each field, from its record in samples.jsonl. Neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .sample_records import Record


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
    choices, loglikelihoods: of likelihood tasks, one of each a choice; nats.
    """

    key: str
    task: str
    doc_id: int
    prompt: str
    prompt_tokens: int
    truncated: int
    output: str
    output_ids: tuple[int, ...]
    target: str | None
    extracted: Mapping[str, str]
    scores: Mapping[str, float]
    finish: str | None
    failure: str | None
    forwards: Mapping[str, int]
    slots: int
    predicted: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float
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
            output_ids=tuple(record["output_ids"]),
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
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.output_ids)

    @property
    def tokens_per_forward(self) -> float | None:
        """Tokens per forward, prefill counted; None where nothing was generated."""
        forwards = sum(self.forwards.values())
        return self.tokens / forwards if self.tokens and forwards else None
