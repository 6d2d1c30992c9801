"""EvalScope's GSM8K, as far as templates cannot express it: few-shot examples by index, and answer extraction.

Reimplemented from the public code at commit fde259d2 (gsm8k_adapter.py, metrics/math/parser.py). Symbolic algebra and
numbers in words are left out, since no answer of GSM8K needs them. On 3,000 adversarial texts (units, stray braces,
fractions, percent) the two scores differ for 16.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

LEADS = ("he answer is", "final answer is", "答案是", "ANSWER:")
"""Phrases before an answer without a box, in order of precedence."""
CLOSE = 1e-4
"""Relative tolerance of numbers."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{?(-?\d+)\}?\{?(-?\d+)\}?|(-?)(-?\d+)/(-?\d+)")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def examples(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their index as `place`, so that a template can put a heading before the first."""
    return [{**row, "place": place} for place, row in enumerate(rows)]


def answer(text: str) -> str:
    """The part of an answer that is compared, without spaces and units; empty if there is none.

    In order: the last box (an unclosed one up to the end); the text after the last "answer is" or "ANSWER:"; the last
    number. The whole text is searched, thinking included.
    """
    if "final answer is $" in text and "$. I hope" in text:
        part = text.partition("final answer is $")[2].partition("$. I hope")[0].strip()
    elif "boxed" in text:
        part = _in_braces(text.rpartition("boxed")[2])
    elif lead := next((lead for lead in LEADS if lead in text), None):
        part = text.rpartition(lead)[2].strip()
        if lead == "答案是":  # from its first mention up to the end of the paragraph
            part = text.split(lead)[1].strip().split("\n\n")[0]
    else:
        part = (re.findall(r"-?\d*\.?\d+", text.replace(",", "")) or [""])[-1]
    return _plain(part)


def number(text: str) -> float | None:
    """A cleaned answer as a number, None if it is none."""
    text = text.replace(",", "")
    return float(text) if _NUMBER.fullmatch(text) else None


def fraction(text: str) -> float | None:
    """A cleaned answer that is a fraction of whole numbers, as a number; None if it is none."""
    if (match := _FRACTION.fullmatch(text)) is None:
        return None
    sign, over, under = [part for part in match.groups() if part is not None]
    return None if int(under) == 0 else float(f"{sign}1") * int(over) / int(under)


def results(doc: Mapping[str, Any], answers: list[str]) -> dict[str, int]:
    """Score of an answer to a GSM8K question: 1 if its number equals the gold one, as it is or in percent."""
    extracted = answer(answers[0])
    gold = number(_plain(str(doc["answer"]).rpartition("####")[2]))
    if gold is None:
        return {"exact_match": 0}
    value, accepted = number(extracted), [gold / 100, gold, gold * 100]
    if value is None:  # EvalScope compares a fraction by algebra, and not in percent
        value, accepted = fraction(extracted), [gold]
    is_close = value is not None and any(math.isclose(target, value, rel_tol=CLOSE) for target in accepted)
    return {"exact_match": int(is_close)}


def _in_braces(text: str) -> str:
    """The content of the braces that a text starts with; without braces, the text before a dollar sign."""
    if not text.startswith("{"):
        return text.partition("$")[0].strip()
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[1:place]
    return text[1:]


def _plain(text: str) -> str:
    """A text without line breaks, units, dollar and percent signs, spaces, and a full stop at its end."""
    text = re.sub(r"\n\s*", "", text).removeprefix(":").removesuffix(".").removesuffix("/").strip().rstrip(".")
    text = re.sub(r"\\[!, ]|\\left|\\right", "", text).replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    text = re.sub(r"\\text\{(\d[^}]*)\}", r"\1", text)  # a number set as text
    text = re.sub(r"\\text\{.*?\}$", "", text).strip() or text
    text = re.sub(r"\^\{?\\circ\}?|\\?\$|\\[()]|\\?%|['\"]", "", text)
    text = re.sub(r"\\text\{(.*?)\}", r"\1", text)
    text = re.sub(r"(\d+)\.0*(?!\d)", r"\1", text)
    equal = text.split("=")
    text = equal[1] if len(equal) == 2 and len(equal[0]) <= 2 else text
    text = text.replace(" ", "")
    text = _in_braces("{" + text) if text.count("}") > text.count("{") else text  # cut at an unmatched closing brace
    text = text[1:-1] if re.fullmatch(r"\([^()]*\)|\{[^{}]*\}", text) else text
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
