"""From scored samples to the result table: scores with intervals, and what the answers cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..common.stats import geometric, interval
from .speed_repeats import Repeat, paces

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a set of answers cost. Every forward counts, prefill and commit too; only ids before the end count.

    slots: fed in all forwards, prompts included.  tokens_per_second is per worker: tokens over the engine's time,
    summed over samples; where the answers were timed again (speed_repeats), the repeats' geometric mean with its 95%
    interval, which one run does not have. What is per token is over the written answers alone: likelihood tasks of a
    group do not dilute it, and it is None where nothing was written.
    unended_thinking: answers of a thinking model that came to no answer.
    """

    tokens: int
    forwards: int
    forwards_by_kind: Mapping[str, int]
    slots: int
    seconds: float
    slots_per_token: float | None
    tokens_per_forward: float | None
    tokens_per_second: float | None
    tokens_per_second_low: float | None
    tokens_per_second_high: float | None
    speed_repeats: int
    truncated_prompts: int
    length_limit_hits: int
    unended_thinking: int


@dataclass(frozen=True)
class Line:
    """One line of the result table. low, high: 95% interval of the score."""

    task: str
    metric: str
    filter: str
    score: float
    low: float
    high: float
    n: int
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the cost's among them."""
        values = asdict(self)
        return {**{k: v for k, v in values.items() if k != "cost"}, **values["cost"]}


def cost(records: Sequence[Record], repeats: Sequence[Repeat] = ()) -> Cost:
    """Sum what the samples cost, in whatever order they come. repeats: the same answers timed again."""
    wrote = [r for r in records if r["finish"] is not None]
    tokens = sum(len(r["output_ids"]) for r in wrote)
    kinds = dict.fromkeys(kind for r in records for kind in r["trace"]["forwards"])
    by_kind = {kind: sum(r["trace"]["forwards"].get(kind, 0) for r in records) for kind in kinds}
    writing = sum(sum(r["trace"]["forwards"].values()) for r in wrote)
    writing_slots, writing_seconds = sum(r["trace"]["slots"] for r in wrote), math.fsum(r["seconds"] for r in wrote)
    again = paces(records, repeats)
    speed = geometric(list(again.values())).to_dict() if again else {"low": None, "high": None}
    alone = tokens / writing_seconds if writing_seconds else None
    return Cost(
        tokens=tokens,
        forwards=sum(by_kind.values()),
        forwards_by_kind=by_kind,
        slots=sum(r["trace"]["slots"] for r in records),
        seconds=math.fsum(r["seconds"] for r in records),
        slots_per_token=writing_slots / tokens if tokens else None,
        tokens_per_forward=tokens / writing if writing else None,
        tokens_per_second=speed.get("mean", alone),
        tokens_per_second_low=speed["low"],
        tokens_per_second_high=speed["high"],
        speed_repeats=len(again),
        truncated_prompts=sum(r["truncated"] > 0 for r in records),
        length_limit_hits=sum(r["finish"] == "length" for r in records),
        unended_thinking=sum(not r.get("thinking_ended", True) for r in records),
    )


def first_scores(records: Sequence[Record]) -> dict[str, float]:
    """Each sample's score by its task's first metric, by key; none for samples that were given up."""
    return {r["key"]: float(next(iter(r["scores"].values()))) for r in records if "lost" not in r}


def lines(task: str, records: Sequence[Record], repeats: Sequence[Repeat] = ()) -> list[Line]:
    """One line per metric and filter of a task or group, over all its samples but those that were given up."""
    records = [record for record in records if "lost" not in record]
    spent = cost(records, repeats)
    found = []
    for name in dict.fromkeys(name for r in records for name in r["scores"]):
        values = interval([r["scores"][name] for r in records if name in r["scores"]])
        metric, _, used = name.partition(",")
        found.append(Line(task, metric, used, values.mean, values.low, values.high, values.n, spent))
    return found
