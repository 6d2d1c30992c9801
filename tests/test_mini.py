"""The mini suite: fixed, disjoint from its training rows, and answerable as its task files ask and score."""

from __future__ import annotations

import importlib.util
import re
from itertools import islice

import pytest

from fluid_eval.benchmarks import lm_eval_tasks
from fluid_eval.benchmarks.humaneval_samples import outcomes_of
from fluid_eval.common.paths import resource
from fluid_eval.common.spec import build_spec
from fluid_eval.sandbox import passing
from fluid_eval.sandbox.ladder import chosen
from fluid_eval.sandbox.passing import trial
from fluid_eval.sandbox.pool import judges

spec = importlib.util.spec_from_file_location("suite", resource("tasks") / "mini" / "suite.py")
suite = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suite)

TESTS = {(task, level): suite.test_rows(task, level) for task in suite.TASKS for level in suite.LEVELS}


def test_test_sets_are_fixed_distinct_and_large_enough():
    for (task, level), rows in TESTS.items():
        assert len({row["key"] for row in rows}) == len(rows) == 70
        assert rows == suite.test_rows(task, level)


def test_train_and_test_rows_are_disjoint():
    test = {row["prompt"] for rows in TESTS.values() for row in rows}
    train = list(islice(suite.train_rows(20_000, seed=1), 20_000))
    assert not test & {row["prompt"] for row in train}
    assert train[:50] == list(suite.train_rows(50, seed=1))
    assert train[:50] != list(suite.train_rows(50, seed=2))
    assert {(row["task"], row["level"]) for row in train} == set(TESTS)


def test_every_step_of_a_story_is_right():
    for level in suite.LEVELS:
        for row in TESTS["mini_gsm8k", level]:
            steps = re.findall(r"<<(.+?)=(\d+)>>(\d+)", row["answer"])
            assert len(steps) == level
            for left, value, shown in steps:
                assert eval(left) == int(value) == int(shown)
            assert row["answer"].endswith(f"#### {steps[-1][1]}")


def test_the_reference_body_passes_and_another_fails():
    rows = [row for level in suite.LEVELS for row in TESTS["mini_humaneval", level][:4]]
    for bodies, passes in (([row["completion"] for row in rows], True), (["    return None\n"] * len(rows), False)):
        trials = [trial(row, row["prompt"] + body) for row, body in zip(rows, bodies, strict=True)]
        outcomes = outcomes_of(judges(chosen(allow_unsafe=True)), trials)
        assert [verdict.passed for verdict in outcomes] == [passes] * len(rows)


@pytest.fixture(scope="module")
def tasks():
    return lm_eval_tasks.load_tasks(build_spec({"tasks": ["mini"], "model": "m"}))["tasks"]


def test_an_answer_judged_early_is_not_run_again(tasks, monkeypatch):
    monkeypatch.setitem(passing._allowed, "unsafe", True)
    row, task = TESTS["mini_humaneval", 1][0], tasks["mini_humaneval_1"]
    doc = task.eval_docs[0]
    lm_eval_tasks.begin_judging({"tasks": tasks}, "mini_humaneval_1", doc, row["completion"])
    lm_eval_tasks.begin_judging({"tasks": tasks}, "mini_math_1", tasks["mini_math_1"].eval_docs[0], "no program")
    begun = len(judges(passing.isolation())._outcomes)
    assert task.process_results(doc, [[row["prompt"] + row["completion"]]]) == {"pass@1": 1.0}
    assert len(judges(passing.isolation())._outcomes) == begun
    assert task.process_results(doc, [[row["prompt"] + "    return None\n"]]) == {"pass@1": 0.0}


@pytest.mark.parametrize(("task", "level"), list(TESTS))
def test_task_files_ask_what_training_rows_show(tasks, task, level):
    """Prompt and reference completion as lm-eval builds them are prompt and completion of the rows."""
    built = tasks[f"{task}_{level}"]
    for doc, row in zip(built.eval_docs, TESTS[task, level], strict=True):
        prompt = built.fewshot_context(doc, 0)
        assert prompt == row["prompt"]
        target = built.doc_to_target(doc)
        if task == "mini_mmlu":
            assert row["completion"] == f" {'ABCD'[target]}"
        elif task == "mini_gsm8k":
            assert row["completion"] == f" {target}"


def test_the_reference_answer_scores_and_another_does_not(tasks):
    for level in suite.LEVELS:
        built = tasks[f"mini_math_{level}"]
        for doc, row in zip(list(built.eval_docs)[:15], TESTS["mini_math", level], strict=False):
            assert built.process_results(doc, [row["completion"]]) == {"exact_match": 1, "math_verify": 1}
            wrong = re.sub(r"\d+(\$\. I hope)", r"999\1", row["completion"])
            assert built.process_results(doc, [wrong])["exact_match"] == 0


@pytest.mark.parametrize(("device", "order"), [("cpu", "kkktttk"), ("other", "ktktktk")])
def test_programs_are_judged_beside_workers_that_leave_processors_alone(
    tiny_model, tmp_path, monkeypatch, device, order
):
    """k: an answer is kept.  t: it is told to the judges. Of likelihood tasks nothing is told."""
    from fluid_eval.common.spec import build_spec
    from fluid_eval.results.run_folder import Run
    from fluid_eval.running.job import run
    from fluid_eval.running.workers import InlinePool

    seen, facts, keep = [], InlinePool.facts, Run.append
    monkeypatch.setattr(lm_eval_tasks, "begin_judging", lambda *_: seen.append("t"))
    monkeypatch.setattr(InlinePool, "facts", lambda *a: {**facts(*a), "device": device})
    monkeypatch.setattr(Run, "append", lambda *a: (keep(*a), seen.append("k")))
    values = {"tasks": "mini_humaneval_1", "model": str(tiny_model), "limit": 3, "max_new_tokens": 4}
    run(build_spec(values), tmp_path / "r")
    run(build_spec({**values, "tasks": "mini_mmlu_1", "limit": 1}), tmp_path / "s")
    assert "".join(seen) == order
