"""What of EvalScope's GSM8K a profile cannot say in templates: which example is the first, and how answers are read.

Read from the public code at commit fde259d2 (gsm8k_adapter.py, metrics/math/parser.py) and written anew; what is not
here is symbolic algebra and numbers in words, which no answer of GSM8K is: of 3,000 texts made to be odd (units, stray
braces, fractions, percent) the two score 16 apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

LEADS = ("he answer is", "final answer is", "答案是", "ANSWER:")
"""What an answer without a box is looked for behind, in this order."""
CLOSE = 1e-4
"""Numbers that differ by less than this share of the expected one are equal."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{?(-?\d+)\}?\{?(-?\d+)\}?|(-?)(-?\d+)/(-?\d+)")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def examples(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their place, so that a template can write something before the first."""
    return [{**row, "place": place} for place, row in enumerate(rows)]


def answer(text: str) -> str:
    """The part of an answer that is compared, spaces and units taken away; empty where there is none.

    The last box (an unclosed one to the end); else what follows the last "answer is" or "ANSWER:"; else the last
    number. The whole text is searched, thoughts too.
    """
    if "final answer is $" in text and "$. I hope" in text:
        found = text.partition("final answer is $")[2].partition("$. I hope")[0].strip()
    elif "boxed" in text:
        found = _inside(text.rpartition("boxed")[2])
    elif lead := next((lead for lead in LEADS if lead in text), None):
        found = text.rpartition(lead)[2].strip()
        if lead == "答案是":  # read from its first mention, and to the end of the paragraph
            found = text.split(lead)[1].strip().split("\n\n")[0]
    else:
        found = (re.findall(r"-?\d*\.?\d+", text.replace(",", "")) or [""])[-1]
    return _plain(found)


def number(text: str) -> float | None:
    """What a cleaned answer is as a number, None where it is none."""
    text = text.replace(",", "")
    return float(text) if _NUMBER.fullmatch(text) else None


def fraction(text: str) -> float | None:
    """What a cleaned answer is as a fraction of whole numbers, None where it is none."""
    if (match := _FRACTION.fullmatch(text)) is None:
        return None
    sign, over, under = [part for part in match.groups() if part is not None]
    return None if int(under) == 0 else float(f"{sign}1") * int(over) / int(under)


def results(doc: Mapping[str, Any], answers: list[str]) -> dict[str, int]:
    """The score of an answer to a GSM8K question: 1 where its number is the expected one, or that in percent."""
    said, wanted = answer(answers[0]), number(_plain(str(doc["answer"]).rpartition("####")[2]))
    if wanted is None:
        return {"exact_match": 0}
    given, expected = number(said), [wanted / 100, wanted, wanted * 100]
    if given is None:  # as EvalScope has it, a fraction is compared by algebra, and not as percent
        given, expected = fraction(said), [wanted]
    close = given is not None and any(math.isclose(one, given, rel_tol=CLOSE) for one in expected)
    return {"exact_match": int(close)}


def _inside(text: str) -> str:
    """What stands in the braces that a text begins with; without any, all before a dollar sign."""
    if not text.startswith("{"):
        return text.partition("$")[0].strip()
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[1:place]
    return text[1:]


def _plain(text: str) -> str:
    """Without line breaks, units, dollar and percent signs, spaces, and a point at its end."""
    text = re.sub(r"\n\s*", "", text).removeprefix(":").removesuffix(".").removesuffix("/").strip().rstrip(".")
    text = re.sub(r"\\[!, ]|\\left|\\right", "", text).replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    text = re.sub(r"\\text\{(\d[^}]*)\}", r"\1", text)  # a number in words' type
    text = re.sub(r"\\text\{.*?\}$", "", text).strip() or text
    text = re.sub(r"\^\{?\\circ\}?|\\?\$|\\[()]|\\?%|['\"]", "", text)
    text = re.sub(r"\\text\{(.*?)\}", r"\1", text)
    text = re.sub(r"(\d+)\.0*(?!\d)", r"\1", text)
    equal = text.split("=")
    text = equal[1] if len(equal) == 2 and len(equal[0]) <= 2 else text
    text = text.replace(" ", "")
    text = _inside("{" + text) if text.count("}") > text.count("{") else text  # a brace that nothing opened ends it
    text = text[1:-1] if re.fullmatch(r"\([^()]*\)|\{[^{}]*\}", text) else text
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
