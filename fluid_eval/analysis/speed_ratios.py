"""How two runs' speeds compare on the documents they share, and what such a ratio does not say. No torch.

Tokens/forward are counts: documents are all there is to be unsure of. Tokens/s are of a machine: only repeats that both
runs took in turns say how sure their ratio is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluid_model.common.files import Nested

from ..common.stats import Interval, geometric, ratio_of_sums
from ..results import speed_conditions, speed_repeats

ONE_RUN = "one run each, no interval: fluid-eval sweep or tax with both as points and --speed-repeats 5 gives one"
APART = "not interleaved: the machine's drift between the runs is in the ratio"


@dataclass(frozen=True)
class Clocked:
    """A run as its speeds need it. held: its repeats.  records: its samples of the documents compared, by task."""

    spec: Nested
    environment: Nested
    result: Nested
    held: Sequence[speed_repeats.Repeat]
    records: Sequence[Sequence[Mapping[str, Any]]]

    @property
    def all(self) -> list[Mapping[str, Any]]:
        return [record for task in self.records for record in task]

    @property
    def conditions(self) -> Nested:
        """As its result tells them; of older runs, what their samples and environment do."""
        held: Nested | None = self.result.get("conditions")
        return held or speed_conditions.describe(self.environment, {**self.result, **self.spec}, self.all)


def speeds(base: Clocked, other: Clocked) -> Nested:
    """Ratios of both speeds, other over base, over the tasks that both wrote answers to; None where there is none.

    not_compared: why tokens/s have no ratio.  cautions: what the ratio of tokens/s does not say.  unequal: what beside
    the decoders is in the ratio of tokens/forward.  conditions: under which those of each run hold.
    """
    wrote = [
        place
        for place, tasks in enumerate(zip(base.records, other.records, strict=True))
        if all(any(record["output_ids"] for record in task) for task in tasks)
    ]
    ours, theirs = (
        replace(run, records=[[r for r in run.records[place] if r["finish"] is not None] for place in wrote])
        for run in (base, other)
    )
    reasons = speed_conditions.unequal_seconds(
        *(speed_conditions.machine(run.environment, run.spec) for run in (base, other))
    )  # fmt: skip
    second = _seconds(ours, theirs) if wrote and not reasons else None
    return {
        "tokens_per_second": second,
        "tokens_per_forward": _forwards(ours, theirs) if wrote else None,
        "not_compared": reasons,
        "cautions": _cautions(base, other, second) if second else [],
        "unequal": speed_conditions.unequal_forwards(ours.conditions, theirs.conditions) if wrote else [],
        "conditions": {
            "base": speed_conditions.drafting(ours.conditions),
            "other": speed_conditions.drafting(theirs.conditions),
        },
    }


def _forwards(base: Clocked, other: Clocked) -> Nested | None:
    columns = [
        [
            [float(len(record["output_ids"])) for record in run.all],
            [float(sum(record["trace"]["forwards"].values())) for record in run.all],
        ]
        for run in (base, other)
    ]
    (a, under_a), (b, under_b) = columns
    ratio = ratio_of_sums([b, under_a], [under_b, a], [len(task) for task in base.records])
    return None if ratio is None else _told(ratio, math.fsum(a) / math.fsum(under_a), math.fsum(b) / math.fsum(under_b))


def _seconds(base: Clocked, other: Clocked) -> Nested | None:
    """By repeats taken in turns where there are any, else by one speed each, without an interval."""
    paces = [speed_repeats.tokens_per_second(run.all, run.held) for run in (base, other)]
    if ratio := speed_repeats.ratio(*paces):
        both = [turn for turn in paces[0] if turn in paces[1]]
        base_speed, other_speed = (geometric([own[turn] for turn in both]).mean for own in paces)
        return {**_told(ratio, base_speed, other_speed), "repeats": len(both), "interleaved": True}
    ours, theirs = (_one(run, own) for run, own in zip((base, other), paces, strict=True))
    if not ours or theirs is None:
        return None
    alone = Interval(theirs / ours, math.nan, math.nan, 1)
    together = bool(session := base.environment.get("session")) and session == other.environment.get("session")
    return {**_told(alone, ours, theirs), "repeats": 0, "interleaved": together}


def _one(run: Clocked, paces: Mapping[speed_repeats.Turn, float]) -> float | None:
    """A run's tokens/s: the mean of its repeats where it has any."""
    if paces:
        return geometric(list(paces.values())).mean
    seconds = math.fsum(float(record["seconds"]) for record in run.all)
    return sum(len(record["output_ids"]) for record in run.all) / seconds if seconds else None


def _cautions(base: Clocked, other: Clocked, second: Nested) -> list[str]:
    found = []
    if not second["interleaved"]:
        found.append(APART)
    if second["low"] is None:
        found.append(ONE_RUN)
    for who, run in (("the base", base), ("the other", other)):
        if not second["repeats"] and (run.environment.get("sessions") or 1) > 1:
            found.append(f"{who} was broken off and resumed: its tokens/s are of several sessions")
    return found


def _told(ratio: Interval, base: float, other: float) -> Nested:
    held = ratio.to_dict()
    return {"ratio": held["mean"], "low": held["low"], "high": held["high"], "base": base, "other": other}
