"""The facts of a report for a paper."""

from __future__ import annotations

from .facts import Facts


def markdown_appendix(facts: Facts) -> str:
    return ""


def latex_table(facts: Facts) -> str:
    return ""
