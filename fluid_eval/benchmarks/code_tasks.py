"""Tasks whose answers are programs, through the sandbox: this package's, and those that lm-eval marks `unsafe_code`.

lm-eval's metrics of such tasks call `code_eval` of the `evaluate` library. That is fetched from the hub and runs
programs in the calling process. Here `evaluate.load("code_eval")` gives `JudgedCodeEval`: the same interface, judged in
isolation.

    mbpp    pass_at_1(references=["assert f(2) == 4\\n…"], predictions=[["def f(x): …"]])
            -> JudgedCodeEval.compute -> Trial(program, tests) -> warden -> {"pass@1": 1.0}

A user's own task needs no Python for this: its target is the tests, and its metric
`!function fluid_eval.benchmarks.code_tasks.pass_at_1`. A task that runs programs by other means is refused, unless code
may run without isolation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fluid_model.common.errors import ConfigError

from ..sandbox import TIMEOUT, Outcome, Trial, passing
from ..sandbox.pool import judges
from .humaneval_samples import pass_rates

Doc = dict[str, Any]


class JudgedCodeEval:
    """code_eval's `compute`, its programs judged by this process's pool."""

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        num_workers: int = 0,
        timeout: float = TIMEOUT,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k for each k up to the programs of every problem, and the outcome of each program by problem.

        references: tests, one text a problem.  predictions: programs of each problem.  num_workers: without effect.
        Raises ConfigError, naming the options, where code cannot be isolated.
        """
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for number, (tests, programs) in enumerate(zip(references, predictions, strict=True)):
            judged = enumerate(outcomes_of([Trial(program, tests, timeout=timeout) for program in programs]))
            results[number] = [
                (i, {"task_id": number, "completion_id": i, "passed": one.passed, "result": one.result})
                for i, one in judged
            ]
        passed = {str(number): [row["passed"] for _, row in rows] for number, rows in results.items()}
        return pass_rates(passed, list(k)), results


CODE_EVAL = JudgedCodeEval()


def pass_at_1(references: Sequence[str], predictions: Sequence[str | Sequence[str]]) -> float:
    """Share of an answer's programs that pass its tests; a `metric` for own task files. Signature: lm-eval's."""
    programs = [[p] if isinstance(p, str) else p for p in predictions]
    return CODE_EVAL.compute(references, programs, [1])[0]["pass@1"]


def outcomes_of(trials: Sequence[Trial]) -> list[Outcome]:
    """Outcomes of trials, judged at the same time. Equal trials of this process run once."""
    pool = judges(passing.isolation())
    futures = [pool.submit(trial) for trial in trials]
    return [future.result() for future in futures]


@contextmanager
def judged_metrics() -> Iterator[None]:
    """Within it, `evaluate.load("code_eval")` gives the judged one: modules of tasks call it when they are imported."""
    import evaluate

    load = evaluate.load

    def judged(path: str, *args: Any, **options: Any) -> Any:
        return CODE_EVAL if path == "code_eval" else load(path, *args, **options)

    evaluate.load = judged
    try:
        yield
    finally:
        evaluate.load = load


def runs_code(task: Any) -> bool:
    """Whether a task's answers are programs."""
    return bool(task.get_config("unsafe_code"))


def check_isolated(tasks: Mapping[str, Any], allow_unsafe: bool) -> None:
    """Raise ConfigError for a task that runs programs by other means than code_eval, unless that is allowed.

    Modules that were imported before with the library's code_eval get the judged one.
    """
    import evaluate

    for name, task in tasks.items():
        for function in _scorers(task) if runs_code(task) else ():
            for variable, value in function.__globals__.items():
                if isinstance(value, evaluate.EvaluationModule) and value.name == "code_eval":
                    function.__globals__[variable] = CODE_EVAL
            if not _is_judged(function) and not allow_unsafe:
                raise ConfigError(
                    f"task {name} runs programs by its own {function.__module__}.{function.__name__}, which cannot be "
                    "isolated; --allow-unsafe-code runs them in this process"
                )


def _scorers(task: Any) -> list[Callable[..., Any]]:
    """Python functions that score a task's answers."""
    named = [task.get_config("process_results"), *(one.get("metric") for one in task.get_config("metric_list") or [])]
    return [function for function in named if hasattr(function, "__globals__")]


def _is_judged(function: Callable[..., Any]) -> bool:
    ours = function.__module__.partition(".")[0] == __package__.partition(".")[0]
    return ours or any(value is CODE_EVAL for value in function.__globals__.values())


def _trials(task: Any, doc: Doc, programs: Sequence[str]) -> list[Trial]:
    """Trials of programs as the task's metric makes them, so that each runs once; none where it has other means."""
    if task.get_config("process_results") is passing.score:
        return [passing.trial(doc, program) for program in programs]
    if not all(map(_is_judged, _scorers(task))):
        return []
    return [Trial(program, str(task.doc_to_target(doc))) for program in programs]


def outcomes(task: Any, doc: Doc, programs: str | Sequence[str]) -> list[Outcome]:
    """Outcomes of an answer's programs, as its filter gave them. Those that were judged before do not run again."""
    return outcomes_of(_trials(task, doc, [programs] if isinstance(programs, str) else programs))


def begin(task: Any, doc: Doc, text: str) -> None:
    """Start the tests of an answer, while others are generated, where its filter reads one answer alone."""
    filters = [one["filter"] for one in task.get_config("filter_list") or []]
    if not filters:
        programs = [text]
    elif len(filters[0]) == 1 and "filter_fn" in filters[0][0]:
        (programs,) = filters[0][0]["filter_fn"]([[text]], [doc])
    else:
        return
    pool = judges(passing.isolation())
    for trial in _trials(task, doc, programs):
        pool.submit(trial)
