"""What a benchmark's row gives as the right answer, where files write it in several ways. What is ambiguous is refused.

MMLU: 0 to 3, or A to D, or the text of one choice. Digits as text count from 0 or from 1 as the whole file shows: a "0"
among them says 0, a "4" says 1. GSM8K: what follows "####".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LETTERS = "ABCD"


def first_digit(answers: Sequence[Any]) -> int | None:
    """What answers written as digits count from, 0 or 1; None where they do not show it.

    answers: of a whole file.
    """
    said = {answer.strip() for answer in answers if isinstance(answer, str)}
    if not said <= set("01234") or {"0", "4"} <= said:
        return None
    return 0 if "0" in said else 1 if "4" in said else None


def choice_of(answer: Any, choices: Sequence[str], first: int | None) -> int:
    """The place of the right choice, from 0.  first: what digits count from.

    Raises ValueError where the answer names none, or two.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # as tables with gaps write whole numbers
    if type(answer) is int and 0 <= answer < len(LETTERS):
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"answer={answer!r:.80} cannot be one: write 0 to 3, or A to D")
    said = answer.strip()
    digit = said.isdecimal() and said.isascii()
    if digit and first is not None:
        return int(said) - first
    meant = {place for place, choice in enumerate(choices) if choice.strip() == said}
    if len(said) == 1 and said.upper() in LETTERS:
        meant.add(LETTERS.index(said.upper()))
    if digit and int(said) <= len(LETTERS):
        raise ValueError(f"answer={answer!r} may count from 0 or from 1: write numbers from 0 to 3, or A to D")
    if len(meant) != 1:
        which = "names two choices" if meant else "is no choice"
        raise ValueError(f"answer={answer!r:.80} {which}: write 0 to 3, or A to D")
    return meant.pop()


def meaning(name: str, row: dict[str, Any]) -> str | None:
    """What is wrong with a row although each field is of its kind, in words; None where nothing is."""
    if name == "gsm8k" and not row["answer"].rpartition("####")[1]:
        return f"answer={row['answer']!r:.60} has no '####' before the number: every answer would be wrong"
    if name == "gsm8k" and not row["answer"].rpartition("####")[2].strip():
        return "answer has nothing after '####'"
    if name == "math500" and not row["answer"].strip():
        return "answer is empty: what finds no answer would be right"
    if name == "humaneval" and not row["entry_point"].isidentifier():
        return f"entry_point={row['entry_point']!r:.60} is no name of a function"
    if name == "humaneval" and "def check(" not in row["test"]:
        return "test defines no check(candidate): every program would be wrong"
    return None
