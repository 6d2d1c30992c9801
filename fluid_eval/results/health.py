"""Health gates: how often something kept answers from being what the model had to say. Reads records alone; no torch.

A sample that a gate counts may have cost its score, so a gate's share is about how many points of score it may explain.
Two BOS at a prompt's start are no gate: the adapter refuses such a prompt before anything is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..common.spec import HealthSpec

Record = Mapping[str, Any]
NO_ANSWER = {"", "[invalid]", "[invalidanswer]"}
"""What lm-eval's filters and Minerva's normaliser give where they found nothing."""
KEYS = 20
"""Keys of samples a gate names at most."""


@dataclass(frozen=True)
class Gate:
    """What one gate counted in one task of a run. n: samples it could have counted.  keys: of the first it counted."""

    gate: str
    task: str
    count: int
    n: int
    threshold: float
    keys: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.count / self.n

    @property
    def ok(self) -> bool:
        return self.share <= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain values, share and ok among them."""
        return {**asdict(self), "keys": list(self.keys), "share": self.share, "ok": self.ok}


@dataclass(frozen=True)
class _Rule:
    """setting: of the threshold, in HealthSpec.  asks: whether a sample can be counted.  counts: whether it is."""

    setting: str
    asks: Callable[[Record], bool]
    counts: Callable[[Record], bool]


def _wrote(record: Record) -> bool:
    return record["finish"] is not None


def _no_answer(record: Record) -> bool:
    """By what the task's first metric compares: where that is a strict format, another filter may have found one."""
    return str(next(iter(record["extracted"].values()))).strip() in NO_ANSWER


def _timed_out(record: Record) -> bool:
    return any(verdict["result"] == "timed out" for verdict in record["verdicts"])


RULES = {
    "length limit": _Rule("length_limit", _wrote, lambda r: r["finish"] == "length"),
    "empty answer": _Rule("empty_answer", _wrote, lambda r: not r["output"].strip()),
    "no answer extracted": _Rule("no_answer", _wrote, _no_answer),
    "prompt truncated": _Rule("prompt_truncated", lambda r: True, lambda r: r["truncated"] > 0),
    "numbers not finite": _Rule("broken", lambda r: True, lambda r: r.get("broken", False)),
    "sandbox time-out": _Rule("sandbox_timeout", lambda r: "verdicts" in r, _timed_out),
    "thinking never ended": _Rule(
        "thinking_never_ended", lambda r: "thinking_ended" in r, lambda r: not r["thinking_ended"]
    ),
}
"""Gates by name."""


def gates(records: Sequence[Record], members: Mapping[str, Sequence[str]], thresholds: HealthSpec) -> list[Gate]:
    """Every gate of every task that has samples it could count. Samples that were given up count nowhere.

    members: leaf tasks of each task of the run, as in a result.
    """
    found = []
    for task, leaves in members.items():
        those = [r for r in records if r["task"] in leaves and "lost" not in r]
        for name, rule in RULES.items():
            asked = [r for r in those if rule.asks(r)]
            keys = [r["key"] for r in asked if rule.counts(r)]
            if asked:
                threshold = getattr(thresholds, rule.setting)
                found.append(Gate(name, task, len(keys), len(asked), threshold, tuple(keys[:KEYS])))
    return found


def judge_again(stored: Sequence[Mapping[str, Any]], thresholds: HealthSpec) -> list[dict[str, Any]]:
    """A result's gates by other thresholds."""
    allowed = {name: getattr(thresholds, rule.setting) for name, rule in RULES.items()}
    return [
        {**gate, "threshold": allowed[gate["gate"]], "ok": gate["share"] <= allowed[gate["gate"]]} for gate in stored
    ]
