"""Gold answers of benchmark rows, whose files write them in several ways. Ambiguous answers are errors.

MMLU: a number from 0 to 3, a letter from A to D, or the text of one choice. Digits as text may count from 0 or from 1;
the file's other answers decide: a "0" anywhere means 0, a "4" means 1. GSM8K: the text after "####".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LETTERS = "ABCD"


def first_digit(answers: Sequence[Any]) -> int | None:
    """Whether answers written as digits count from 0 or from 1; None if undecided. answers: of a whole file."""
    digits = {answer.strip() for answer in answers if isinstance(answer, str)}
    if not digits <= set("01234") or {"0", "4"} <= digits:
        return None
    return 0 if "0" in digits else 1 if "4" in digits else None


def choice_of(answer: Any, choices: Sequence[str], first: int | None) -> int:
    """Index of the right choice, from 0.  first: see `first_digit`.

    Raises ValueError if the answer names no choice, or two.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # data frames with missing values store whole numbers as floats
    if type(answer) is int and 0 <= answer < len(LETTERS):
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"answer={answer!r:.80} cannot be one: write 0 to 3, or A to D")
    text = answer.strip()
    is_digit = text.isdecimal() and text.isascii()
    if is_digit and first is not None:
        return int(text) - first
    candidates = {place for place, choice in enumerate(choices) if choice.strip() == text}
    if len(text) == 1 and text.upper() in LETTERS:
        candidates.add(LETTERS.index(text.upper()))
    if is_digit and int(text) <= len(LETTERS):
        raise ValueError(f"answer={answer!r} may count from 0 or from 1: write numbers from 0 to 3, or A to D")
    if len(candidates) != 1:
        which = "names two choices" if candidates else "is no choice"
        raise ValueError(f"answer={answer!r:.80} {which}: write 0 to 3, or A to D")
    return candidates.pop()


def problem_of(name: str, row: dict[str, Any]) -> str | None:
    """Why a row whose fields have the right types cannot be scored, for an error message; None if it can."""
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
