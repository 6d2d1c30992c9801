"""Prompts that are only read: questions with four choices behind shots that a subject shares, as in MMLU."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from fluid_model import Score, Scorer, ScoreRequest

from .. import clock
from .plan import Bench, Bounds, GpuPlan

BOUNDS: Bounds = {}
SUBJECTS, QUESTIONS = 4, 32
SHOTS, OWN, CHOICES = 700, 90, 4
"""Tokens of the shots and of a question, about those of MMLU's with five shots; and answers of one token each."""


def measure(bench: Bench) -> None:
    """Questions a second, with shots read once a subject and once a question, beside what products allow."""
    plan, put = bench.plan, bench.measurements.put
    rate = clock.product_rate(plan.device, bench.backbone.dtype, plan.forwards)
    ceiling = rate / (2 * bench.read / torch.finfo(bench.backbone.dtype).bits * 8)  # tokens a second
    put("products, TFLOP/s", 0, rate / 1e12)
    for rows in plan.concurrency:
        took = {shared: seconds(bench, rows, work(plan, shared=shared)) for shared in (True, False)}
        tokens = {shared: fed(plan, shared=shared) for shared in took}
        put("scoring, questions/s", rows, _questions(plan) / took[True])
        put("scoring, tokens read/s", rows, tokens[True] / took[True])
        put("scoring, tokens read/s / what products allow", rows, tokens[True] / took[True] / ceiling)
        put("scoring, nothing shared: tokens read/s / what products allow", rows, tokens[False] / took[False] / ceiling)
        put("scoring, time with nothing shared / shared", rows, took[False] / took[True])


def work(plan: GpuPlan, *, shared: bool) -> list[ScoreRequest]:
    """Random ids; where nothing is shared every question begins otherwise."""
    generator = torch.Generator().manual_seed(2)
    shots, own = lengths(plan)
    requests = list[ScoreRequest]()
    for subject in range(SUBJECTS):
        before = torch.randint(plan.vocabulary, (shots,), generator=generator).tolist()
        for question in range(_questions(plan) // SUBJECTS):
            first = before[0] if shared else len(requests)
            asked = torch.randint(plan.vocabulary, (own,), generator=generator).tolist()
            context = (first, *before[1:], *asked)
            requests.append(ScoreRequest(f"{subject}/{question}", tuple((context, (c,)) for c in range(CHOICES))))
    return requests


def lengths(plan: GpuPlan) -> tuple[int, int]:
    """Tokens of shots and of a question: smaller where the plan is."""
    return min(SHOTS, plan.context), min(OWN, plan.context // 4)


def fed(plan: GpuPlan, *, shared: bool) -> int:
    """Tokens that are read: the last of a prompt says the choices, which are not."""
    shots, own = lengths(plan)
    return (SUBJECTS if shared else _questions(plan)) * shots + _questions(plan) * own


def _questions(plan: GpuPlan) -> int:
    return SUBJECTS * (QUESTIONS if plan.is_whole else 2)


def seconds(bench: Bench, rows: int, asked: list[ScoreRequest]) -> float:
    """Median time of scoring them all."""
    scorer = Scorer(bench.backbone, rows)
    call = partial(_all, scorer, asked)
    return statistics.median([clock.took(call, bench.plan.device)[0] for _ in range(1 + bench.plan.runs)][1:])


def _all(scorer: Scorer, asked: list[ScoreRequest]) -> list[Score]:
    return list(scorer.score(asked))
