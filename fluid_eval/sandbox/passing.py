"""Programs from completions, and whether they pass: what the task files name, and pass@k."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from . import Trial, Verdict
from .ladder import chosen
from .pool import judges

Doc = dict[str, Any]
_allowed = {"unsafe": False}


def allow_unsafe(allowed: bool) -> None:
    """Whether programs may run where nothing isolates them. lm-eval calls `score` without settings, so this is kept."""
    _allowed["unsafe"] = allowed


def isolation() -> str:
    """The tier that programs are judged in. Raises ConfigError, naming the options, where there is none."""
    return chosen(allow_unsafe=_allowed["unsafe"])


def build_predictions(resps: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """The function's head and the model's body, per document and repeat."""
    return [[doc["prompt"] + body for body in bodies] for bodies, doc in zip(resps, docs, strict=True)]


def build_predictions_instruct(resps: list[list[str]], docs: list[Doc]) -> list[list[str]]:
    """As build_predictions, the body being what stands before the end of its code fence."""
    return build_predictions([[body.partition("```")[0] for body in bodies] for bodies in resps], docs)


def trial(doc: Doc, program: str) -> Trial:
    """A program for a HumanEval document: its prompt defines what tests may use beside the function itself."""
    return Trial(program, f"{doc['test']}\ncheck({doc['entry_point']})\n", doc["prompt"], doc["entry_point"])


def begin(doc: Doc, programs: Sequence[str]) -> None:
    """Have programs judged while others are being written."""
    here = judges(isolation())
    for program in programs:
        here.submit(trial(doc, program))


def verdicts(doc: Doc, programs: Sequence[str]) -> list[Verdict]:
    """What became of programs; those judged before are not run again."""
    here = judges(isolation())
    return [future.result() for future in [here.submit(trial(doc, program)) for program in programs]]


def score(doc: Doc, results: list[list[str]]) -> dict[str, float]:
    """pass@1 of a document's programs, for the task files."""
    (programs,) = results
    return {"pass@1": pass_at_k(len(programs), sum(v.passed for v in verdicts(doc, programs)), 1)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k: 1 - C(n - c, k) / C(n, k), n programs of which c pass, k <= n.  (Chen et al. 2021)"""
    return 1.0 - comb(n - c, k) / comb(n, k)
