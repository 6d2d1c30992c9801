"""HumanEval programs from completions, their tests, and pass@k. Task files name `build_predictions` and `score`."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from . import Outcome, Trial
from .ladder import chosen
from .pool import judges

Doc = dict[str, Any]
_allowed = {"unsafe": False}


def allow_unsafe(allowed: bool) -> None:
    """Set whether programs may run without isolation. Global state, since lm-eval calls `score` without settings."""
    _allowed["unsafe"] = allowed


def isolation() -> str:
    """The tier that programs run in. Raises ConfigError, naming the options, if there is none."""
    return chosen(allow_unsafe=_allowed["unsafe"])


def build_predictions(resps: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """Prompt and completion joined, by document and repeat."""
    return [[doc["prompt"] + body for body in bodies] for bodies, doc in zip(resps, docs, strict=True)]


def build_predictions_instruct(resps: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """As build_predictions, each completion cut at the end of its code fence."""
    return build_predictions([[body.partition("```")[0] for body in bodies] for bodies in resps], docs)


def trial(doc: Doc, program: str) -> Trial:
    """The trial of a program for a HumanEval document. The prompt is the setup: tests may use its helpers."""
    return Trial(program, f"{doc['test']}\ncheck({doc['entry_point']})\n", doc["prompt"], doc["entry_point"])


def begin(doc: Doc, programs: Sequence[str]) -> None:
    """Start the tests of programs, while others are generated."""
    pool = judges(isolation())
    for program in programs:
        pool.submit(trial(doc, program))


def outcomes(doc: Doc, programs: Sequence[str]) -> list[Outcome]:
    """Outcomes of programs. Trials that were started before are not run again."""
    pool = judges(isolation())
    futures = [pool.submit(trial(doc, program)) for program in programs]
    return [future.result() for future in futures]


def score(doc: Doc, results: list[list[str]]) -> dict[str, float]:
    """pass@1 of a document's programs; the task files' process_results."""
    (programs,) = results
    passed = sum(outcome.passed for outcome in outcomes(doc, programs))
    return {"pass@1": pass_at_k(len(programs), passed, 1)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of n programs, c of which pass: 1 - C(n - c, k) / C(n, k), k <= n.  (Chen et al. 2021)"""
    return 1.0 - comb(n - c, k) / comb(n, k)
