"""Health gates: how many answers the set-up may have spoiled, rather than the model. Reads records only; no torch.

Examples: an answer cut off by the length limit, a truncated prompt, no answer extracted, non-finite logits. A counted
sample may have lost its score, so a gate's share bounds the points of score that the fault may explain. A prompt with
two BOS tokens has no gate: `lm_eval_model` refuses it before anything is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..common.spec import HealthSpec
from .sample_records import UNKNOWN

Record = Mapping[str, Any]
NO_ANSWER = {"", "[invalid]", "[invalidanswer]"}
"""Results of lm-eval's filters and Minerva's normaliser where they extract nothing."""
KEYS = 20
"""Sample keys that a gate lists at most."""


@dataclass(frozen=True)
class Gate:
    """One gate of one task. count: samples with the fault, of the n it applies to.  keys: of the first KEYS of them."""

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
        """Plain values, with share and ok."""
        return {**asdict(self), "keys": list(self.keys), "share": self.share, "ok": self.ok}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gate:
        """The gate of `to_dict`."""
        return cls(**{f.name: values[f.name] for f in fields(cls)} | {"keys": tuple(values["keys"])})


@dataclass(frozen=True)
class _Rule:
    """setting: the threshold's field in HealthSpec.  applies: to which samples.  is_faulty: of those."""

    setting: str
    applies: Callable[[Record], bool]
    is_faulty: Callable[[Record], bool]


def _is_generated(record: Record) -> bool:
    return record["finish"] is not None


def _end_is_known(record: Record) -> bool:
    return record["finish"] not in (None, UNKNOWN)


def _no_answer(record: Record) -> bool:
    """Nothing extracted by the filter of the task's first metric; a laxer filter may have extracted an answer."""
    return str(next(iter(record["extracted"].values()))).strip() in NO_ANSWER


def _timed_out(record: Record) -> bool:
    return any(verdict["result"] == "timed out" for verdict in record["verdicts"])


RULES = {
    "length limit": _Rule("length_limit", _end_is_known, lambda r: r["finish"] == "length"),
    "empty answer": _Rule("empty_answer", _is_generated, lambda r: not r["output"].strip()),
    "no answer extracted": _Rule("no_answer", lambda r: _is_generated(r) and bool(r.get("extracted")), _no_answer),
    "prompt truncated": _Rule("prompt_truncated", lambda r: r["truncated"] is not None, lambda r: r["truncated"] > 0),
    "numbers not finite": _Rule("broken", lambda r: True, lambda r: r.get("broken", False)),
    "sandbox time-out": _Rule("sandbox_timeout", lambda r: "verdicts" in r, _timed_out),
    "thinking never ended": _Rule(
        "thinking_never_ended", lambda r: "thinking_ended" in r, lambda r: not r["thinking_ended"]
    ),
}
"""Gates by name."""


def gates(records: Sequence[Record], members: Mapping[str, Sequence[str]], thresholds: HealthSpec) -> list[Gate]:
    """Gates of each task, those aside that apply to no sample. Samples whose request failed do not count.

    members: leaf tasks of each task of the run, as in a result.
    """
    results = []
    for task, leaves in members.items():
        answered = [r for r in records if r["task"] in leaves and "lost" not in r]
        for name, rule in RULES.items():
            applicable = [r for r in answered if rule.applies(r)]
            keys = [r["key"] for r in applicable if rule.is_faulty(r)]
            if applicable:
                threshold = getattr(thresholds, rule.setting)
                results.append(Gate(name, task, len(keys), len(applicable), threshold, tuple(keys[:KEYS])))
    return results


def judge_again(stored: Sequence[Mapping[str, Any]], thresholds: HealthSpec) -> list[dict[str, Any]]:
    """Stored gates under other thresholds."""
    allowed = {name: getattr(thresholds, rule.setting) for name, rule in RULES.items()}
    return [
        {**gate, "threshold": allowed[gate["gate"]], "ok": gate["share"] <= allowed[gate["gate"]]} for gate in stored
    ]
