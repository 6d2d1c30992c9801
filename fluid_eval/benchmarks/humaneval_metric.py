"""pass@k as a metric of the `evaluate` library, with code_eval's interface, judged in the sandbox. No network.

    metric = evaluate.load("PATH/OF/THIS/FILE")        or CodeEval()
    rates, results = metric.compute(predictions=[["def add(a, b): return a + b"]], references=["assert add(2, 3) == 5"])

References are trusted code. They run in another process than the predictions, whose functions they call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import datasets
import evaluate

from fluid_model.common.errors import ConfigError

from ..sandbox import TIMEOUT, Trial
from ..sandbox.ladder import chosen
from ..sandbox.pool import JudgePool
from .humaneval_samples import outcomes_of, pass_rates

Results = dict[int, list[tuple[int, dict[str, Any]]]]


class CodeEval(evaluate.Metric):
    """pass@k of programs that are judged in isolation."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="pass@k: whether programs pass their tests, each judged in a process that can reach nothing.",
            citation="Chen et al. 2021, Evaluating Large Language Models Trained on Code",
            inputs_description="predictions: programs, a list for each problem. references: its tests, as Python code.",
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = TIMEOUT,
    ) -> tuple[dict[str, float], Results]:
        """pass@k for each k up to the programs of every problem, and the outcome of each program by problem.

        Raises ConfigError, naming the options, where code cannot be isolated.
        """
        if len(predictions) != len(references):
            raise ConfigError(f"{len(predictions)} lists of predictions for {len(references)} references")
        # 1) judge all programs of all problems
        trials = [
            Trial(program, tests, timeout=timeout)
            for programs, tests in zip(predictions, references, strict=True)
            for program in programs
        ]
        with closing(JudgePool(chosen(allow_unsafe=False), num_workers)) as judges:
            judged = iter(outcomes_of(judges, trials))
        # 2) by problem
        results: Results = {}
        for task, programs in enumerate(predictions):
            for number, outcome in zip(range(len(programs)), judged, strict=False):
                row = {"task_id": task, "passed": outcome.passed, "result": outcome.result, "completion_id": number}
                results.setdefault(task, []).append((number, {**row, "isolation": outcome.isolation}))
        outcomes = {str(task): [row["passed"] for _, row in results.get(task, ())] for task in range(len(predictions))}
        return pass_rates(outcomes, list(k)), results
