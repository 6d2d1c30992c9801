"""Predicted strides and accepted lengths of speculative decoding, counted from stored samples alone. No torch.

A speculative step is one forward that verifies a draft and makes the next one. A sample's trace holds two lists with an
entry for each step, which it calls a round:

    "trace": {"predicted": [4, 2, 5], "accepted": [4, 1]}     the answer ended before the third step was verified

predicted stride: tokens that a step sets out to commit, the causal model's own next token counted (1..K).
accepted length: tokens that the answer grew by after verification (0..K).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]
ALL = "all"
"""The entry of all tasks together."""
Strides = list[tuple[int, int]]
"""(predicted stride, accepted length) of each speculative step of one answer."""


def acceptance_by_task(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Predicted strides and accepted lengths of each task, and of `all` tasks together. Empty if no decoder drafted.

    rounds: number of speculative steps that were verified.
    predicted: histogram of the predicted stride, from 1.  accepted: histogram of the accepted length, from 0.
    joint: [predicted - 1][accepted], number of steps.
    by_round: mean accepted length in the first, second, .. step of an answer, and how many answers came so far.
    """
    # 1) pairs of each answer, by task
    answers_of: dict[str, list[Strides]] = {}
    for record in records:
        trace = record.get("trace") or {}
        if trace.get("predicted"):
            # the last step lacks its accepted length if the answer ended first
            steps = list(zip(trace["predicted"], trace["accepted"], strict=False))
            answers_of.setdefault(record["task"], []).append(steps)
    if not answers_of:
        return {}
    # 2) one table a task, all of one width
    every_answer = [steps for answers in answers_of.values() for steps in answers]
    longest = max((max(pair) for steps in every_answer for pair in steps), default=1)
    return {task: _histograms(answers, longest) for task, answers in {**answers_of, ALL: every_answer}.items()}


def _histograms(answers: list[Strides], longest: int) -> dict[str, Any]:
    """One task's entry. longest: the largest stride or accepted length of any task."""
    joint = [[0] * (longest + 1) for _ in range(longest)]
    by_step: list[list[int]] = [[] for _ in range(max(map(len, answers)))]
    for steps in answers:
        for number, (predicted, accepted) in enumerate(steps):
            joint[predicted - 1][accepted] += 1
            by_step[number].append(accepted)
    return {
        "rounds": sum(map(len, answers)),
        "predicted": [sum(row) for row in joint],
        "accepted": [sum(column) for column in zip(*joint, strict=True)],
        "joint": joint,
        "by_round": [
            {"round": number, "n": len(lengths), "accepted": sum(lengths) / len(lengths)}
            for number, lengths in enumerate(by_step, 1)
        ],
    }  # fmt: skip
