"""How far drafts went and how much of them was kept, from stored samples alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]
ALL = "all"


def strides(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Rounds by task, and of `all` tasks together; empty where no decoder with strides wrote.

    rounds: those that ended.  predicted, accepted: how many rounds drafted 1, 2, .. tokens (the token that is certain
    counted) and kept 0, 1, .. of them.  joint: [drafted - 1][kept], rounds.  by_round: mean kept in an answer's first,
    second, .. round, and how many answers came so far.
    """
    pairs: dict[str, list[list[tuple[int, int]]]] = {}
    for record in records:
        trace = record.get("trace") or {}
        if trace.get("predicted"):
            rounds = list(zip(trace["predicted"], trace["accepted"], strict=False))  # the last may not have ended
            pairs.setdefault(record["task"], []).append(rounds)
    if not pairs:
        return {}
    widest = max((max(pair) for answers in pairs.values() for rounds in answers for pair in rounds), default=1)
    everything = [rounds for answers in pairs.values() for rounds in answers]
    return {task: _table(answers, widest) for task, answers in {**pairs, ALL: everything}.items()}


def _table(answers: list[list[tuple[int, int]]], widest: int) -> dict[str, Any]:
    joint = [[0] * (widest + 1) for _ in range(widest)]
    kept: list[list[int]] = [[] for _ in range(max(map(len, answers)))]
    for rounds in answers:
        for number, (predicted, accepted) in enumerate(rounds):
            joint[predicted - 1][accepted] += 1
            kept[number].append(accepted)
    return {
        "rounds": sum(map(len, answers)),
        "predicted": [sum(row) for row in joint],
        "accepted": [sum(column) for column in zip(*joint, strict=True)],
        "joint": joint,
        "by_round": [
            {"round": number, "n": len(each), "accepted": sum(each) / len(each)}
            for number, each in enumerate(kept, 1)
        ],
    }  # fmt: skip
