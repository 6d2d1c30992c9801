"""Speed ratios of two runs over the documents they share, and the limits of such a ratio. No torch.

Tokens/forward are counts: only the choice of documents makes them uncertain. Tokens/s are measurements of a machine:
only repeats that both runs took in turns give their ratio an interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluid_model.common.files import Nested

from ..common.stats import Interval, geometric, ratio_of_sums
from ..results import speed_conditions, speed_repeats
from ..results.metrics import total
from ..results.sample_records import forwards_of, tokens_of

ONE_RUN = "one run each, no interval: fluid-eval sweep or tax with both as points and --speed-repeats 5 gives one"
APART = "not interleaved: the machine's drift between the runs is in the ratio"


@dataclass(frozen=True)
class TimedRun:
    """A run as its speeds need it. repeats: its speed repeats.  records: samples of the shared documents, by task."""

    spec: Nested
    environment: Nested
    result: Nested
    repeats: Sequence[speed_repeats.Repeat]
    records: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def all(self) -> list[Mapping[str, Any]]:
        """The samples of all tasks."""
        return [record for task in self.records for record in task]

    @property
    def conditions(self) -> Nested:
        """Stored in its result; of older runs, derived from samples and environment."""
        stored: Nested | None = self.result.get("conditions")
        return stored or speed_conditions.describe(self.environment, {**self.result, **self.spec}, self.all)


def speeds(base: TimedRun, other: TimedRun) -> Nested:
    """Ratios of both speeds, other over base, over the tasks that both generated answers to; None where there is none.

    generated: both runs generated answers, to any task.
    not_compared: reasons why tokens/s have no ratio.  cautions: limits of the ratio of tokens/s.
    unequal: conditions beside the decoders that differ and affect tokens/forward.  conditions: of each run.
    """
    # 1) tasks with generated answers in both runs, and their generated samples
    shared = [
        number
        for number, tasks in enumerate(zip(base.records, other.records, strict=True))
        if all(any(tokens_of(record) for record in task) for task in tasks)
    ]
    ours, theirs = _generated(base, shared), _generated(other, shared)
    # 2) tokens/s, where both ran on the same machine in the same way
    machines = [speed_conditions.machine(run.environment, run.spec) for run in (base, other)]
    reasons = speed_conditions.unequal_seconds(*machines)
    second = _per_second(ours, theirs) if shared and not reasons else None
    return {
        "tokens_per_second": second,
        "tokens_per_forward": _per_forward(ours, theirs) if shared else None,
        "generated": bool(shared),
        "not_compared": reasons,
        "cautions": _cautions(base, other, second) if second else [],
        "unequal": speed_conditions.unequal_forwards(ours.conditions, theirs.conditions) if shared else [],
        "conditions": {
            "base": speed_conditions.drafting(ours.conditions),
            "other": speed_conditions.drafting(theirs.conditions),
        },
    }


def _generated(run: TimedRun, tasks: Sequence[int]) -> TimedRun:
    """The run with the generated samples of these tasks alone."""
    records = [[record for record in run.records[number] if record["finish"] is not None] for number in tasks]
    return replace(run, records=records)


def _per_forward(base: TimedRun, other: TimedRun) -> Nested | None:
    """Ratio of tokens/forward: (tokens / forwards) of the other over that of the base, documents paired."""
    ours, theirs = _counts(base), _counts(other)
    if ours is None or theirs is None:
        return None
    (tokens_a, forwards_a), (tokens_b, forwards_b) = ours, theirs
    ratio = ratio_of_sums([tokens_b, forwards_a], [forwards_b, tokens_a], [len(task) for task in base.records])
    if ratio is None:
        return None
    return _entry(
        ratio, math.fsum(tokens_a) / math.fsum(forwards_a), math.fsum(tokens_b) / math.fsum(forwards_b)
    )  # fmt: skip


def _counts(run: TimedRun) -> tuple[list[float], list[float]] | None:
    """Tokens and forwards of each sample; None if one is unknown."""
    counts = [(tokens_of(record), forwards_of(record)) for record in run.all]
    known = [(float(tokens), float(fwd)) for tokens, fwd in counts if tokens is not None and fwd is not None]
    return ([t for t, _ in known], [f for _, f in known]) if len(known) == len(counts) else None


def _per_second(base: TimedRun, other: TimedRun) -> Nested | None:
    """Ratio of tokens/s: from repeats taken in turns where there are any, else from one run each, no interval."""
    # 1) repeats that both runs took in turns
    paces = [speed_repeats.tokens_per_second(run.all, run.repeats) for run in (base, other)]
    if ratio := speed_repeats.ratio(*paces):
        both = [turn for turn in paces[0] if turn in paces[1]]
        means = [geometric([own[turn] for turn in both]).mean for own in paces]
        return {**_entry(ratio, *means), "repeats": len(both), "interleaved": True}
    # 2) one speed each
    ours, theirs = _tokens_per_second(base, paces[0]), _tokens_per_second(other, paces[1])
    if not ours or theirs is None:
        return None
    ratio = Interval(theirs / ours, math.nan, math.nan, 1)
    session = base.environment.get("session")
    is_interleaved = bool(session) and session == other.environment.get("session")
    return {**_entry(ratio, ours, theirs), "repeats": 0, "interleaved": is_interleaved}


def _tokens_per_second(run: TimedRun, paces: Mapping[speed_repeats.Turn, float]) -> float | None:
    """A run's tokens/s: the mean of its repeats where it has any. None if they took no time, or none is known."""
    if paces:
        return geometric(list(paces.values())).mean
    seconds, tokens = total(record["seconds"] for record in run.all), total(map(tokens_of, run.all))
    return tokens / seconds if seconds and tokens is not None else None


def _cautions(base: TimedRun, other: TimedRun, second: Nested) -> list[str]:
    """Limits of a ratio of tokens/s."""
    cautions = []
    if not second["interleaved"]:
        cautions.append(APART)
    if second["low"] is None:
        cautions.append(ONE_RUN)
    for name, run in (("the base", base), ("the other", other)):
        if backend := (run.spec.get("backend") or {}).get("name"):
            cautions.append(f"{name} was written by {backend}: tokens over wall time of its calls")
        if not second["repeats"] and (run.environment.get("sessions") or 1) > 1:
            cautions.append(f"{name} was broken off and resumed: its tokens/s are of several sessions")
    return cautions


def _entry(ratio: Interval, base: float, other: float) -> Nested:
    values = ratio.to_dict()
    return {"ratio": values["mean"], "low": values["low"], "high": values["high"], "base": base, "other": other}
