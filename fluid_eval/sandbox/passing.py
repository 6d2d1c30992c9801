"""Programs from completions, and whether they pass."""

from __future__ import annotations

from math import comb
from typing import Any

from . import run_program


def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """The function's head and the model's body, per document and repeat."""
    return [[doc["prompt"] + body for body in bodies] for bodies, doc in zip(resps, docs, strict=True)]


def build_predictions_instruct(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """As build_predictions, the body being what stands before the end of its code fence."""
    return build_predictions([[body.partition("```")[0] for body in bodies] for bodies in resps], docs)


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """Unbiased pass@k of one document: 1 - C(n - c, k) / C(n, k), n programs of which c pass.  (Chen et al. 2021)"""
    (tests,), (programs,) = references, predictions
    n, c = len(programs), sum(run_program(f"{program}\n{tests}\n").passed for program in programs)
    return {f"pass@{size}": 1.0 - comb(n - c, size) / comb(n, size) for size in k if size <= n}
