"""The result table from scored samples: scores with intervals, and costs (tokens, forwards, slots, seconds)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, cast

from ..common.stats import geometric, interval
from .sample_records import UNKNOWN, forwards_of, tokens_of
from .speed_repeats import Repeat, tokens_per_second

Record = Mapping[str, Any]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Cost:
    """Cost of a set of answers. What one of them does not tell is None for all: never 0.

    tokens: ids of generated answers before their end token.  forwards: all kinds, prefill and commit included.
    slots: fed in all forwards, prompts included.  seconds: the engine's time, summed over samples.
    *_per_token, tokens_per_*: over generated answers only, so that likelihood tasks of a group do not dilute them; None
    where nothing was generated.
    tokens_per_second: per worker.  With speed repeats, their geometric mean with a 95% interval (low, high); one run
    has no interval.
    unended_thinking: answers of a thinking model without an end of thinking.
    """

    tokens: int | None
    forwards: int | None
    forwards_by_kind: Mapping[str, int]
    slots: int | None
    seconds: float | None
    slots_per_token: float | None
    tokens_per_forward: float | None
    tokens_per_second: float | None
    tokens_per_second_low: float | None
    tokens_per_second_high: float | None
    speed_repeats: int
    truncated_prompts: int | None
    length_limit_hits: int | None
    unended_thinking: int


@dataclass(frozen=True)
class TableRow:
    """One row of the result table: one metric of a task or group. low, high: 95% interval of the score, over n samples.

    filter: lm-eval's answer extraction that the metric was computed on.  value: of a metric that is no mean over
    documents, such as a perplexity; it has no score and no interval.
    """

    task: str
    metric: str
    filter: str
    score: float | None
    low: float | None
    high: float | None
    n: int
    cost: Cost
    value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those of the cost at the same level."""
        values = asdict(self)
        spent = values.pop("cost")
        if self.value is None:
            del values["value"]
        return {**values, **spent}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TableRow:
        """The row of `to_dict`. Costs that earlier versions did not store are None, their speed repeats 0."""
        spent = {f.name: values.get(f.name, 0 if f.name == "speed_repeats" else None) for f in fields(Cost)}
        own = {f.name: values[f.name] for f in fields(cls) if f.name not in ("cost", "value")}
        return cls(**own, cost=Cost(**spent), value=values.get("value"))


def cost(records: Sequence[Record], repeats: Sequence[Repeat] = ()) -> Cost:
    """Cost of samples, independent of their order. repeats: the same answers timed again."""
    # 1) all samples
    forwards = total(map(forwards_of, records))
    kinds = dict.fromkeys(kind for r in records for kind in r["trace"]["forwards"] or ())
    by_kind = {
        kind: sum(r["trace"]["forwards"].get(kind, 0) for r in records) for kind in kinds if forwards is not None
    }
    # 2) generated ones only
    generated = [r for r in records if r["finish"] is not None]
    tokens = total(map(tokens_of, generated))
    generated_forwards = total(map(forwards_of, generated))
    generated_slots = total(r["trace"]["slots"] for r in generated)
    generated_seconds = total(r["seconds"] for r in generated)
    limited = [None if r["finish"] == UNKNOWN else r["finish"] == "length" for r in records]
    # 3) speed: of the repeats where there are any, else of this run
    repeated = tokens_per_second(records, repeats)
    speed = geometric(list(repeated.values())).to_dict() if repeated else {"low": None, "high": None}
    of_this_run = tokens / generated_seconds if generated_seconds and tokens is not None else None
    return Cost(
        tokens=tokens,
        forwards=forwards,
        forwards_by_kind=by_kind,
        slots=total(r["trace"]["slots"] for r in records),
        seconds=total(r["seconds"] for r in records),
        slots_per_token=generated_slots / tokens if tokens and generated_slots is not None else None,
        tokens_per_forward=tokens / generated_forwards if generated_forwards and tokens is not None else None,
        tokens_per_second=speed.get("mean", of_this_run),
        tokens_per_second_low=speed["low"],
        tokens_per_second_high=speed["high"],
        speed_repeats=len(repeated),
        truncated_prompts=total(None if r["truncated"] is None else r["truncated"] > 0 for r in records),
        length_limit_hits=total(limited),
        unended_thinking=sum(not r.get("thinking_ended", True) for r in records),
    )


def total(values: Iterable[Number | None]) -> Number | None:
    """The sum of numbers; None if one of them is unknown."""
    known = list(values)
    if any(value is None for value in known):
        return None
    numbers = [value for value in known if value is not None]
    result: Any = sum(numbers) if all(isinstance(value, int) for value in numbers) else math.fsum(numbers)
    return cast("Number | None", result)


def first_scores(records: Sequence[Record]) -> dict[str, float]:
    """Score of each sample by its task's first metric, by key; samples without a score have none."""
    return {r["key"]: float(next(iter(r["scores"].values()))) for r in records if "lost" not in r and r["scores"]}


def table_rows(
    task: str, records: Sequence[Record], repeats: Sequence[Repeat] = (), values: Mapping[str, float] | None = None
) -> list[TableRow]:
    """One row a metric and filter of a task or group, over its samples; those whose request failed do not count.

    values: of metrics that are no mean over documents, by "metric,filter".
    """
    records = [record for record in records if "lost" not in record]
    spent = cost(records, repeats)
    rows = []
    for name in dict.fromkeys(name for r in records for name in r["scores"]):
        mean = interval([r["scores"][name] for r in records if name in r["scores"]])
        metric, _, filter_name = name.partition(",")
        rows.append(TableRow(task, metric, filter_name, mean.mean, mean.low, mean.high, mean.n, spent))
    for name, value in (values or {}).items():
        metric, _, filter_name = name.partition(",")
        rows.append(TableRow(task, metric, filter_name, None, None, None, len(records), spent, value))
    return rows
